"""Decide what becomes of every layer, so that the network lands on its target."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dyncompress.allocation import Widths, allocate, by_importance, uniform
from dyncompress.budget import Budget, readable
from dyncompress.conversion import convert
from dyncompress.cost import Choice, CostModel, static_choices, widths
from dyncompress.errors import BudgetError, PlanError
from dyncompress.evaluation import measure_latency
from dyncompress.graph import ConvGraph, Operation, trace
from dyncompress.importance import importance
from dyncompress.layers import ConvSite, Method, Static, get_method
from dyncompress.plan import Plan

ALLOCATIONS = ("uniform", "importance")
_UNITS = {"macs": "MACs", "params": "parameters"}


@dataclass(frozen=True)
class Reach:
    """What a network can be brought to: cost of the original, and of the narrowest and widest student."""

    quantity: str
    original: int
    lowest: int
    highest: int

    def __str__(self) -> str:
        low, high = self.lowest / self.original, self.highest / self.original
        return (
            f"{readable(self.lowest)} to {readable(self.highest)} {_UNITS[self.quantity]}"
            f" ({low:.1%} to {high:.1%} of {readable(self.original)})"
        )


class Problem:
    """A network, a method and what may not be touched: everything about a plan but its target."""

    def __init__(
        self, net: nn.Module, graph: ConvGraph, method: Method, ignore: Sequence[str | type], min_width: int
    ) -> None:
        self.net, self.graph, self.method = net, graph, method
        ignored = _ignored(net, graph, ignore)
        self.choices = [_choice(op, method, ignored, graph.convs[0].module) for op in graph.convs]
        self.full = widths(graph)
        held = _held(graph, ignored)
        self.floors = [
            c if g in held else min(min_width, max(1, c // 4)) for g, c in enumerate(self.full)
        ]  # fmt: skip
        self.model = CostModel(graph, self.choices)
        self.before = CostModel(graph, static_choices(graph, Static()))

    def reach(self, quantity: str = "macs") -> Reach:
        """The reachable range of MACs or parameters."""
        before, after = getattr(self.before, quantity), getattr(self.model, quantity)
        return Reach(quantity, before(self.full), after(self.floors), after(self.full))

    def solve(self, budget: Budget, allocation: str, tolerance: float) -> Plan:
        """The plan that lands on a budget of MACs or parameters."""
        reach = self.reach(budget.quantity)
        target = budget.absolute(reach.original)
        if not reach.lowest <= target * (1 + tolerance) or target * (1 - tolerance) > reach.highest:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(self.graph.pinned.items())[:5])
            raise BudgetError(
                f"target '{budget.text}' ({readable(target)} {_UNITS[budget.quantity]}) can't be reached with method"
                f" '{self.method.name}': {reach}; choose a target in that range, lower min_width, or free layers"
                f" (width kept: {why or 'none'})"
            )
        cost = getattr(self.model, budget.quantity)
        ideal = (
            by_importance(importance(self.net, self.graph), self.floors)
            if allocation == "importance"
            else uniform(self.full, self.floors)
        )
        keep = allocate(cost, ideal, self.full, self.floors, target, tolerance, self.model.out_widths)
        return self.plan(keep, budget.text, allocation)

    def plan(self, keep: Widths, target: str, allocation: str) -> Plan:
        """A plan of given widths."""
        options = {k: v for k, v in vars(self.method).items() if not k.startswith("_")}
        return Plan(self.graph, tuple(keep), tuple(self.choices), self.method.name, options, target, allocation)


def make_plan(
    net: nn.Module,
    example: Any,
    target: str | float = "33%",
    method: str | Method = "dynet",
    *,
    options: Mapping[str, Any] | None = None,
    allocation: str = "uniform",
    ignore: Sequence[str | type] = (),
    min_width: int = 8,
    tolerance: float = 0.01,
) -> Plan:
    """Decide a width and a method for every convolution; nothing is touched.

    Args:
        net: Any trained network.
        example: What its ``forward`` takes: a tensor, a tuple of arguments, or a dict of keyword arguments.
        target: Fraction of the original (``0.33``, ``"33%"``) or absolute cost (``"1.2G"``), of MACs by default, of
            parameters (``"40% params"``) or of measured batch-1 latency (``"60% latency"``).
        method: Registered name (see ``dyncompress methods``), or a method with its options. ``"static"`` narrows
            only: the control arm.
        options: Options of a method given by name.
        allocation: ``"uniform"``: one ratio everywhere; ``"importance"``: one threshold on the channels' magnitude.
        ignore: Layers to leave as they are, by name (globs such as ``"layer1.*"``) or by type (``nn.Conv1d`` or
            ``"Conv1d"``).
        min_width: Channels that a group keeps at least (a quarter of the group, where that is less).
        tolerance: Relative distance from the target that still counts as landed, from below.

    Returns:
        The plan: ``print`` it, ``save`` it, edit it, `convert` with it.

    Raises:
        TraceError: If the network fails on the example or has no convolution.
        BudgetError: If the target is ill-formed or out of reach; gives the reachable range.
        UnknownMethodError: If there is no such method.
        PlanError: If ``ignore`` or ``allocation`` names what doesn't exist.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 10, 1))
        >>> plan = make_plan(net, torch.zeros(1, 3, 16, 16), target="50%", method="static")
        >>> plan.widths, round(plan.ratio, 3)
        ([45, 44], 0.5)
    """
    budget = Budget.parse(target)
    if allocation not in ALLOCATIONS:
        raise PlanError(f"allocation {allocation!r} is unknown; choose one of {', '.join(ALLOCATIONS)}")
    if isinstance(min_width, bool) or not isinstance(min_width, int) or min_width < 1:
        raise PlanError(
            f"min_width {min_width!r} is not a positive integer; give the channels that a layer keeps at least"
        )
    if not 0 < tolerance < 1:
        raise BudgetError(f"tolerance {tolerance!r} is not between 0 and 1; 0.01 lands within 1% of the target")
    problem = Problem(net, trace(net, example), _method(method, options), ignore, min_width)
    if budget.quantity == "latency":
        return _solve_latency(net, example, problem, budget, allocation, tolerance)
    return problem.solve(budget, allocation, tolerance)


def reachable(
    net: nn.Module,
    example: Any,
    method: str | Method = "dynet",
    *,
    options: Mapping[str, Any] | None = None,
    ignore: Sequence[str | type] = (),
    min_width: int = 8,
) -> Reach:
    """The range of MACs that `make_plan` can land in, with the same arguments."""
    return Problem(net, trace(net, example), _method(method, options), ignore, min_width).reach()


def _method(method: str | Method, options: Mapping[str, Any] | None) -> Method:
    if isinstance(method, str):
        return get_method(method, **(options or {}))
    if options:
        raise PlanError(f"options {dict(options)} are given beside a configured method {method}; give its name instead")
    return method


def _choice(op: Operation, method: Method, ignored: Mapping[str, str], first: str) -> Choice:
    assert op.spec is not None
    if op.module in ignored:
        return Choice(op.module, Static(), reason=ignored[op.module])
    if isinstance(method, Static):
        return Choice(op.module, method)
    if op.module == first:
        return Choice(op.module, Static(), reason="static: the first convolution, which reads the input")
    placed, reason = method.place(ConvSite(op.module, op.spec, op.positions))
    shared = placed.sharing == "block" and not isinstance(placed, Static)
    return Choice(op.module, placed, op.block if shared else "", reason)


def _ignored(net: nn.Module, graph: ConvGraph, ignore: Sequence[str | type]) -> dict[str, str]:
    """Layers to leave as they are, and which pattern says so."""
    if isinstance(ignore, (str, type)):
        ignore = (ignore,)
    names = [op.module for op in graph.operations if op.weight]
    found: dict[str, str] = {}
    for pattern in ignore:
        shown = pattern if isinstance(pattern, str) else pattern.__name__
        types = {name: type(net.get_submodule(name)) for name in names}
        hits = [
            name
            for name in names
            if (isinstance(pattern, type) and issubclass(types[name], pattern))
            or (isinstance(pattern, str) and (fnmatchcase(name, pattern) or pattern == types[name].__name__))
        ]
        if not hits:
            near = difflib.get_close_matches(shown, [*names, *{t.__name__ for t in types.values()}], n=3)
            raise PlanError(
                f"ignore {shown!r} matches no layer; give a name, a glob such as 'layer1.*', or a type"
                f" (near: {', '.join(near) or ', '.join(names[:3])})"
            )
        found |= {name: f"ignored by {shown!r}" for name in hits}
    return found


def _held(graph: ConvGraph, ignored: Mapping[str, str]) -> set[int]:
    """Groups that touch an ignored layer."""
    return {
        group for op in graph.operations if op.module in ignored for _, parts in op.axes for group, _ in parts
    }  # fmt: skip


def _solve_latency(
    net: nn.Module, example: Any, problem: Problem, budget: Budget, allocation: str, tolerance: float
) -> Plan:
    """The widest student that is fast enough, by halving the range of MACs and measuring a student each time.

    Only a measurement tells: time does not fall in step with MACs. Seven halvings place the MACs within 1 % of the
    range, finer than the clock.
    """
    reach = problem.reach()
    low, high = reach.lowest / reach.original, min(1.0, reach.highest / reach.original)
    best: Plan | None = None
    fastest = float("inf")
    fraction = low  # the narrowest student first: where it is too slow, nothing will do
    for _ in range(8):
        plan = problem.solve(Budget(fraction, True, "macs", budget.text), allocation, tolerance)
        timed = measure_latency({"original": net, "student": convert(net, plan)}, example, batch_sizes=(1,))
        ratio = timed["student"][1].ratio
        fastest = min(fastest, ratio)
        if ratio <= budget.value:
            best, low = plan, fraction
        elif best is None:
            break
        else:
            high = fraction
        fraction = (low + high) / 2
    if best is None:
        raise BudgetError(
            f"target '{budget.text}' can't be reached with method '{problem.method.name}': the fastest student that was"
            f" measured takes {fastest:.0%} of the original's time at batch 1; ask for more, or try method 'static'"
        )
    return best
