"""dyncompress on one network: plan, convert, and everything that must hold afterwards."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.checks import TOLERANCE, distance, learns, round_trip, run, same_form
from benchmarks.networks import build
from benchmarks.networks.handmade import READ_ACROSS, read_otherwise
from benchmarks.zeroing import equivalence, exempt
from dyncompress.conversion import convert, narrowed, plan_of
from dyncompress.cost import measure_macs
from dyncompress.errors import BudgetError, DynCompressError
from dyncompress.plan import Plan
from dyncompress.planning import make_plan, reachable

_LIBRARY = re.compile(rf".*(site-packages|\.zoo|{re.escape(str(Path(__file__).parents[1]))})/")
WITHIN = 0.01  # of the target
METHOD = "dynet"  # of all rows in results/zoo.json, whatever the default is


def attempt(report: Callable[[dict[str, Any]], None], name: str, targets: list[int]) -> None:
    """Try every target on a network and report the row as it grows; `phase` tells where a hang is."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "phase": "build", "targets": {}}
    report(row)
    try:
        net, example = build(name)
        row |= {"input": [list(t.shape) for t in tree_leaves(example) if isinstance(t, Tensor)]}
        run(net, example)
        row["parameters"] = sum(p.numel() for p in net.parameters())
    except Exception as error:  # noqa: BLE001 - a network that doesn't even build is a finding about the zoo
        report(row | {"error": told(error)})
        return
    before = {key: value.clone() for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    for target in targets:
        phase = f"{target} %"
        report(row | {"phase": phase})
        found: dict[str, Any] = {"status": "running"}
        row["targets"][str(target)] = found

        def progress(step: str, row: dict[str, Any] = row, phase: str = phase) -> None:
            report(row | {"phase": f"{phase}: {step}"})

        try:
            _target(net, example, target / 100, found, row, progress)
        except DynCompressError as error:
            found |= {"status": "refused", "reason": f"{type(error).__name__}: {error}"}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a crash of ours and goes into the table
            found |= {"status": "crash", "reason": told(error)}
        report(row)
    changed = [key for key, value in before.items() if not torch.equal(value, net.state_dict()[key])]
    report(row | {"phase": "", "touched": changed[:3]})


def told(error: Exception) -> str:
    """An error and the innermost places that it came from."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = [f"{_LIBRARY.sub('', frame.filename)}:{frame.lineno}" for frame in reversed(frames)]
    return f"{type(error).__name__}: {str(error)[:300]} ({' < '.join(places)})"


def _target(
    net: nn.Module, example: Any, target: float, found: dict[str, Any], row: dict[str, Any], step: Callable[[str], None]
) -> None:
    started, cpu = time.perf_counter(), time.process_time()
    step("plan")
    try:
        plan = make_plan(net, example, target, METHOD)
        step("convert")
        student = convert(net, plan)
        found |= {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    except BudgetError as error:
        found |= {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "refusal": str(error)}
        step("nearest target")
        plan = make_plan(net, example, _nearest(net, example, target, found), METHOD)
        student = convert(net, plan)
    resolved = plan_of(student)
    assert resolved is not None
    if "pinned" not in row:
        row |= _reasons(resolved)
    step("measure")
    row["macs"] = measure_macs(net, example)
    reached = measure_macs(student, example)
    found |= {"asked": target, "reached": reached / row["macs"], "planned": resolved.ratio}
    found["macs as planned"] = reached == resolved.macs_after and row["macs"] == resolved.macs_before
    found["landed"] = "refusal" not in found and abs(found["reached"] / target - 1) <= WITHIN
    if not found["landed"] and "range" not in found:
        _nearest(net, example, target, found)
    step("checks")
    found["checks"] = _checks(net, resolved, student, example, "zeroing" not in row, row, step)
    wrong = [f"{check}: {text}" for check, text in found["checks"].items() if text and not text.startswith("n/a")]
    found["status"] = "wrong" if wrong else "ok" if found["landed"] else "missed"
    if wrong:
        found["reason"] = "; ".join(wrong)


def _nearest(net: nn.Module, example: Any, target: float, found: dict[str, Any]) -> float:
    """The reachable target that is nearest to one that isn't."""
    reach = reachable(net, example, METHOD)
    low, high = reach.lowest / reach.original, reach.highest / reach.original
    found["range"] = [low, high]
    return low * 1.001 if target < low else min(high, 1.0)


def _reasons(plan: Plan) -> dict[str, Any]:
    pinned = plan.graph.pinned
    static = {row.name: row.reason for row in plan.layers if row.method == "static" and row.reason}
    return {
        "groups": len(plan.graph.groups),
        "convolutions": len(plan.graph.convs),
        "dynamic": sum(row.method != "static" for row in plan.layers),
        "pinned": {"count": len(pinned), "first": dict(list(pinned.items())[:6])},
        "static": {"count": len(static), "first": dict(list(static.items())[:6])},
    }


def _checks(
    net: nn.Module,
    plan: Plan,
    student: nn.Module,
    example: Any,
    zeroing: bool,
    row: dict[str, Any],
    step: Callable[[str], None],
) -> dict[str, str]:
    """'' where a check passes, 'n/a: why' where it does not apply, and what is wrong otherwise."""
    checks: dict[str, str] = {}

    def check(name: str, function: Callable[[], str]) -> None:
        step(name)
        try:
            checks[name] = function()
        except Exception as error:  # noqa: BLE001 - a student that breaks on its checks is wrong, and the table says how
            checks[name] = told(error)

    check("forward", lambda: same_form(student, net, example))
    check("step 0", lambda: _step_zero(net, plan, student, example))
    if zeroing:  # what doesn't depend on the widths is checked at the first target
        check("round trip", lambda: round_trip(student, plan, net, example))
        check("backward", lambda: learns(student, net, example))
        row["zeroing"] = {}
        check("zeroing", lambda: _zeroing(net, plan, example, row))
    return checks


def _step_zero(net: nn.Module, plan: Plan, student: nn.Module, example: Any) -> str:
    off = distance(run(student, example), run(narrowed(net, plan), example))
    return "" if off < TOLERANCE else f"the student is {off:.1e} from the narrowed network"


def _zeroing(net: nn.Module, plan: Plan, example: Any, row: dict[str, Any]) -> str:
    why = "its test says so" if row["name"] in READ_ACROSS else exempt(net, plan, example)
    if why:
        return f"n/a: {why}"
    row["zeroing"] = equivalence(net, plan, example, read_otherwise(row["name"]))
    return str(row["zeroing"]["wrong"])
