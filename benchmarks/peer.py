"""torch-pruning on one network, given its best chance.

It is told which layers write the output, every parameter requires a gradient (it follows autograd), widths are not
rounded, and the pruning ratio is searched until the MACs land, first with one ratio for all layers, then with global
ranking. Numbers of attention heads, which a user would have to look up by hand, are not given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checks import learns, run, same_form, tensors
from benchmarks.networks import build, call
from benchmarks.ours import WITHIN, told
from dyncompress.cost import measure_macs

TRIES = 10  # pruning ratios, of each way to rank channels


def attempt(report: Callable[[dict[str, Any]], None], name: str, targets: list[int]) -> None:
    """Try every target on a network and report the row as it grows."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "phase": "build", "targets": {}}
    report(row)
    try:
        net, example = build(name)
        run(net, example)
    except Exception as error:  # noqa: BLE001 - a network that doesn't even build is a finding about the zoo
        report(row | {"error": told(error)})
        return
    for target in targets:
        found: dict[str, Any] = {"status": "running"}
        row["targets"][str(target)] = found
        started = time.perf_counter()
        for ranking in (False, True):
            report(row | {"phase": f"{target} %, {'global' if ranking else 'uniform'} ranking"})
            try:
                result = _search(net, example, target / 100, ranking)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a crash of the peer and goes into the table
                result = {"status": "crash", "reason": told(error)}
            better = ("running", "crash", "wrong", "missed", "ok")
            if better.index(result["status"]) > better.index(found["status"]):
                found.clear()
                found |= result
            found["seconds"] = time.perf_counter() - started
            if found["status"] == "ok":
                break
        report(row)


def _search(net: nn.Module, example: Any, target: float, ranking: bool) -> dict[str, Any]:
    found = search(net, example, target, ranking)
    wrong = same_form(found.network, net, example) or learns(found.network, net, example)
    landed = abs(found.reached / target - 1) <= WITHIN
    status = "wrong" if wrong and not wrong.startswith("n/a") else "ok" if landed else "missed"
    return {
        "status": status, "reached": found.reached, "pruning ratio": found.ratio, "global": ranking, "reason": wrong
    }  # fmt: skip


@dataclass(frozen=True)
class Pruned:
    """A pruned network.

    Attributes:
        ratio: The pruning ratio.
        reached: Share of the MACs that is left.
        network: The network.
        history: What was pruned: name of a layer, whether its output channels, which of them.
    """

    ratio: float
    reached: float
    network: nn.Module
    history: list[tuple[str, bool, list[int]]]


Importance = Callable[[nn.Module], Any]
"""Takes the copy that is to be pruned, gives one of torch-pruning's importances."""


def magnitude(net: nn.Module) -> Any:
    """Its default: norms of the weights of coupled layers."""
    import torch_pruning

    return torch_pruning.importance.MagnitudeImportance(p=2)


def search(net: nn.Module, example: Any, target: float, ranking: bool, importance: Importance = magnitude) -> Pruned:
    """The network pruned as near to a share of its MACs as a few tries get.

    It interpolates the square root of the MACs, which falls about in step with the widths.

    Args:
        net: The network; left as it is.
        example: What it takes.
        target: Share of its MACs.
        ranking: Whether channels of all layers are ranked together.
        importance: By what.
    """
    original = measure_macs(net, example)
    outputs = _writers_of_the_output(net, example)
    low, high = (0.0, 1.0), (1.0, 0.0)  # (pruning ratio, root of what is left of the MACs)
    best: Pruned | None = None
    for _ in range(TRIES):
        share = (low[1] - math.sqrt(target)) / max(low[1] - high[1], 1e-9)
        ratio = low[0] + (high[0] - low[0]) * min(max(share, 0.1), 0.9)
        small, history = _pruned(net, example, outputs, ratio, ranking, importance)
        reached = measure_macs(small, example) / original
        if best is None or abs(reached - target) < abs(best.reached - target):
            best = Pruned(ratio, reached, small, history)
        if abs(reached / target - 1) <= WITHIN:
            break
        if reached > target:
            low = (ratio, math.sqrt(reached))
        else:
            high = (ratio, math.sqrt(reached))
    assert best is not None
    return best


def _pruned(
    net: nn.Module, example: Any, outputs: list[str], ratio: float, ranking: bool, importance: Importance
) -> tuple[nn.Module, list[tuple[str, bool, list[int]]]]:
    import torch_pruning

    copy = deepcopy(net).eval()
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    pruner = torch_pruning.pruner.BasePruner(
        copy,
        example,
        importance=importance(copy),
        global_pruning=ranking,
        pruning_ratio=ratio,
        ignored_layers=[copy.get_submodule(name) for name in outputs],
        in_channel_groups={},  # its defaults are shared between calls
        out_channel_groups={},
        num_heads={},
        forward_fn=call,
        output_transform=lambda output: [t for t in tensors(output) if t.grad_fn is not None],
    )
    pruner.step()
    for parameter, before in _pairs(copy, net):
        parameter.requires_grad_(before.requires_grad)
    return copy, pruner.pruning_history()


def _pairs(small: nn.Module, net: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    before = dict(net.named_parameters())
    return ((p, before[name]) for name, p in small.named_parameters() if name in before)


def _writers_of_the_output(net: nn.Module, example: Any) -> list[str]:
    """Convolutions and linear layers from which the output is reached through no other."""
    copy = deepcopy(net).eval()
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    writes: dict[Any, str] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        writes[output.grad_fn] = names[module]

    names = {m: name for name, m in copy.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
    for module in names:
        module.register_forward_hook(note)
    ahead = [t.grad_fn for t in tensors(call(copy, example)) if t.grad_fn is not None]
    found, seen = [], set(ahead)
    while ahead:
        node = ahead.pop()
        if node in writes:
            found.append(writes[node])
            continue
        before = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= before
        ahead.extend(before)
    return found
