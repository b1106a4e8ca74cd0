"""Decide what becomes of every layer, so that the network lands on its target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dyncompress.allocation import Widths, affordable, by_importance, multiples, near, uniform
from dyncompress.budget import UNITS, Budget, Limit, Reach, Target, readable
from dyncompress.cost import Choice, CostModel, static_choices, widths
from dyncompress.errors import BudgetError, PlanError, shown
from dyncompress.graph import ConvGraph, Operation
from dyncompress.importance import IMPORTANCES, best, importance
from dyncompress.knapsack import allocate
from dyncompress.latencytable import LatencyTable
from dyncompress.layers import Auto, ConvSite, Method, Static, configured
from dyncompress.marginal import Terms
from dyncompress.pacing import Pacer, table_for
from dyncompress.plan import Plan
from dyncompress.prediction import Prediction
from dyncompress.presets import Preset, find_preset
from dyncompress.ranking import Ranking, check, rank
from dyncompress.selection import Floors, Patterns, held, named, smallest
from dyncompress.sensitivity import Sensitivity
from dyncompress.sharing import share_of
from dyncompress.taylor import Loss
from dyncompress.tracing import Tracer
from dyncompress.worth import chosen, placed

ALLOCATIONS = ("uniform", "importance", "sensitivity")


class Problem:
    """A network, a method and what may not be touched: everything about a plan but its target.

    Args:
        net: The network.
        graph: Its channel graph.
        method: What its convolutions become.
        ignore: Layers to leave as they are.
        min_width: Channels that a group keeps at least.
        floors: Layers and the channels, or the share of them, that each keeps at least.
        static: Layers to narrow and leave static.
        ranking: Which channels go first; by magnitude where none is given.
        sensitivity: What the score loses by each group's width, for the allocation of that name.
        preset: The paper's network whose placement is to be had, with options that go before its own.
    """

    def __init__(
        self,
        net: nn.Module,
        graph: ConvGraph,
        method: Method,
        ignore: Patterns = (),
        min_width: int = 8,
        *,
        floors: Floors | None = None,
        static: Patterns = (),
        ranking: Ranking | None = None,
        sensitivity: Sensitivity | None = None,
        preset: tuple[Preset, Mapping[str, Any]] | None = None,
    ) -> None:
        self.net, self.graph, self.method = net, graph, method
        self.ranking, self.sensitivity, self.settled = ranking, sensitivity, preset is not None
        reasons = {
            name: f"static: asked by {pattern!r}" for name, pattern in named(net, graph, static, "static").items()
        }
        ignored = {name: f"ignored by {pattern!r}" for name, pattern in named(net, graph, ignore, "ignore").items()}
        fixed = {**reasons, **ignored}
        self.free = [op for op in graph.convs if op.module not in fixed and op.module != graph.anchor]
        each = [_choice(op, method, fixed, graph.anchor) for op in graph.convs]
        self.place(preset[0].choices(graph, method, fixed, preset[1]) if preset else each)
        self.full = widths(graph)
        kept = held(graph, ignored)
        least = smallest(net, graph, floors or {}, min_width)
        self.floors = [c if g in kept else floor for g, (c, floor) in enumerate(zip(self.full, least, strict=True))]
        self.before = CostModel(graph, static_choices(graph, Static()))

    def place(self, choices: Sequence[Choice]) -> None:
        """Have other methods for some convolutions."""
        self.choices = list(choices)
        self.model = CostModel(self.graph, self.choices)

    def pace(self, prediction: Prediction, keep: Widths) -> None:
        """Have methods by the clock, at the widths of a plan; a preset's stay."""
        if isinstance(self.method, Auto) and self.method.cost == "time":
            self.place(chosen(self.method, prediction, self.model, keep, self.free))
        elif not self.settled:
            self.place(placed(prediction, self.model, keep))

    def reach(self, quantity: str = "macs") -> Reach:
        """The reachable range of MACs or parameters."""
        before, after = getattr(self.before, quantity), getattr(self.model, quantity)
        return Reach(quantity, before(self.full), after(self.floors), after(self.full))

    def as_published(self, preset: Preset) -> Plan:
        """The plan of the preset's widths, which costs what it costs."""
        keep = preset.widths(self.graph, self.floors)
        return self.plan(keep, str(self.model.macs(keep)), preset.name)

    def solve(self, budget: Budget, allocation: str, tolerance: float) -> Plan:
        """The plan that lands on a budget of MACs, parameters or both.

        Raises:
            BudgetError: If a limit is out of reach.
        """
        reaches = {limit.quantity: self.reach(limit.quantity) for limit in budget.limits}
        targets = [limit.absolute(reaches[limit.quantity].original) for limit in budget.limits]
        self._check(budget.limits, targets, list(reaches.values()), tolerance)
        costs = [Terms(self.model, limit.quantity) for limit in budget.limits]
        each = multiples(self.graph)
        if allocation == "sensitivity":
            assert self.sensitivity is not None
            losses = self.sensitivity.losses(self.graph, each)
        else:
            by_score = allocation == "importance"
            ideal = by_importance(self._scores(), self.floors) if by_score else uniform(self.full, self.floors)
            losses = near(affordable(ideal, costs, targets), self.full, each)
        keep = allocate(costs, targets, losses, self.floors, tolerance, each)
        return self.plan(keep, str(budget), allocation)

    def _check(self, limits: Sequence[Limit], targets: Sequence[float], reaches: Sequence[Reach], near: float) -> None:
        """Raise where a limit is below the range, or all of them are above it."""
        found = list(zip(limits, targets, reaches, strict=True))
        beyond = [f for f in found if f[1] < f[2].lowest]
        if not beyond and all(r.lowest < r.highest < t * (1 - near) for _, t, r in found):
            beyond = found
        if not beyond:
            return
        asked = " and ".join(f"'{limit.text}' ({readable(t)} {UNITS[limit.quantity]})" for limit, t, _ in beyond)
        ranges = " and ".join(str(reach) for _, _, reach in beyond)
        why = "; ".join(f"{name}: {reason}" for name, reason in list(self.graph.pinned.items())[:5])
        free = "choose a target in that range, lower min_width or floors, or free layers"
        if all(r.lowest == r.highest for _, _, r in found):  # which may be above 100 %: dynamic, and not narrowed
            free = "no width can change; ask for " + " and ".join(
                f"{r.highest} {UNITS[r.quantity]}" for *_, r in beyond
            )
        raise BudgetError(
            f"target {asked} can't be reached with method '{self.method.name}': {ranges}; {free}"
            f" (width kept: {why or 'none'})"
        )

    def _scores(self) -> list[Any]:
        return self.ranking.scores if self.ranking is not None else importance(self.net, self.graph)

    def plan(self, keep: Widths, target: str, allocation: str) -> Plan:
        """A plan of given widths; which channels stay is left to `convert`, where magnitude decides."""
        options = {k: v for k, v in vars(self.method).items() if not k.startswith("_")}
        kept: list[int | tuple[int, ...]] = list(keep)
        if self.ranking is not None and self.ranking.name != "magnitude":
            kept = [best(s, k) if k < len(s) else k for s, k in zip(self.ranking.scores, keep, strict=True)]
        by = self.ranking.name if self.ranking is not None else "magnitude"
        return Plan(self.graph, tuple(kept), tuple(self.choices), self.method.name, options, target, allocation, by)


def make_plan(
    net: nn.Module,
    example: Any,
    target: Target | None = None,
    method: str | Method | None = None,
    *,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    allocation: str = "uniform",
    importance: str = "magnitude",
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    sensitivity: Sensitivity | None = None,
    ignore: Patterns = (),
    static: Patterns = (),
    floors: Floors | None = None,
    min_width: int = 8,
    tolerance: float = 0.01,
    table: LatencyTable | None = None,
) -> Plan:
    """Decide a width and a method for every convolution; nothing is touched.

    Args:
        net: Any trained network.
        example: What its ``forward`` takes: a tensor, a tuple of arguments, or a dict of keyword arguments.
        target: Fraction of the original (``0.33``, ``"33%"``) or absolute cost (``"1.2G"``), of MACs by default, of
            parameters (``"40% params"``) or of measured batch-1 latency (``"60% latency"``). Several hold at once:
            ``"33%, 50% params"``; none is exceeded, and the one that binds is landed on. By default ``"33%"``, or the
            widths of the preset.
        method: Registered name (see ``dyncompress methods``), or a method with its options; ``"auto"`` by default,
            which chooses layer by layer. ``"static"`` narrows only: the control arm.
        preset: Name of a paper's network, such as ``"dy-resnet18"`` (see docs/presets.md), whose method, options,
            placement and, without a target, widths are applied to this one.
        options: Options of a method given by name (of ``"auto"`` without one), or those in which it shall differ from
            the preset.
        allocation: How many channels each group keeps. ``"uniform"``: the same ratio everywhere; ``"importance"``:
            one threshold on the channels' importance; ``"sensitivity"``: the least sum of measured score drops.
        importance: Which channels stay: ``"magnitude"`` of the weights, ``"bn"``: scales of the BatchNorms,
            ``"taylor"``: estimated change of the loss on ``batches``.
        batches: For ``importance="taylor"``: a few batches, labelled as `evaluate` takes them (or as ``loss`` does).
        loss: For ``importance="taylor"``: ``loss(net, batch)``; cross-entropy of logits and labels by default.
        sensitivity: For ``allocation="sensitivity"``: what `dyncompress.sensitivity.measure` gives.
        ignore: Layers to leave as they are, by name (globs such as ``"layer1.*"``) or by type (``nn.Conv1d`` or
            ``"Conv1d"``).
        static: Layers to narrow and not to make dynamic, likewise.
        floors: Layers and what they keep of their output channels at least, a number or a share:
            ``{"layer4.*": 0.5, "conv1": 24}``. With ``1.0`` a layer keeps its width and may still become dynamic.
        min_width: Channels that a group keeps at least (a quarter of the group, where that is less).
        tolerance: Relative distance from the target that still counts as landed, from below.
        table: Measured times of layers. With one, layers are dynamic only where their time is worth it, whatever the
            target; without, a target in latency has the one that is kept in the user's cache, and so has
            ``method="auto"`` with ``cost="time"``.

    Returns:
        The plan: ``print`` it, ``save`` it, edit it, `convert` with it.

    Raises:
        TraceError: If the network fails on the example or has no convolution.
        BudgetError: If the target is ill-formed or out of reach; gives the reachable range.
        UnknownMethodError: If there is no such method.
        PlanError: If another argument names what doesn't exist, or lacks what it needs; or if the network has not the
            form that the preset is for.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 10, 1))
        >>> plan = make_plan(net, torch.zeros(1, 3, 16, 16), target="50%", method="static")
        >>> plan.widths, round(plan.ratio, 3)
        ([48, 41], 0.499)
    """
    paper = find_preset(preset) if preset is not None else None
    budget = None if paper and target is None else Budget.parse("33%" if target is None else target)
    check_shares(allocation, importance)
    if budget is None and allocation != "uniform":
        raise PlanError(
            f"allocation {allocation!r} is given with preset {preset!r} and no target; the widths are the paper's then:"
            " give a target, or leave allocation out"
        )
    if sensitivity is not None and not isinstance(sensitivity, Sensitivity):
        raise PlanError(
            f"sensitivity {shown(sensitivity)} is no map of score drops; give what dyncompress.sensitivity.measure"
            " returns"
        )
    if (allocation == "sensitivity") != (sensitivity is not None):
        raise PlanError(
            f"allocation {allocation!r} is given with{'out' * (sensitivity is None)} a sensitivity map; 'sensitivity'"
            " needs one, from dyncompress.sensitivity.measure, and the others take none"
        )
    _check_width(min_width)
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise BudgetError(f"tolerance {shown(tolerance)} is not between 0 and 1; 0.01 lands within 1% of the target")
    check(importance, batches, loss)
    method = asked_method(method, options, paper)
    tracer = Tracer(net, example, linear=getattr(method, "linear", False))
    timed = budget is not None and budget.limit("latency") is not None
    table = table_for(net, table, timed or (table is None and getattr(method, "cost", None) == "time"))
    method = _settled(method, budget, table is not None)
    scored = importance != "magnitude" or allocation == "importance"  # `convert` scores by magnitude itself
    while True:
        graph = tracer.graph
        ranking = rank(net, graph, importance, batches, loss) if scored else None
        problem = Problem(
            net,
            graph,
            method,
            ignore,
            min_width,
            floors=floors,
            static=static,
            ranking=ranking,
            sensitivity=sensitivity,
            preset=(paper, options or {}) if paper else None,
        )
        if budget is None:
            assert paper is not None
            plan = problem.as_published(paper)
        elif table is None:
            plan = problem.solve(budget, allocation, tolerance)
        else:
            plan = _paced(net, example, problem, budget, (allocation, tolerance), table, tracer)
        if tracer.graph == graph and tracer.follows(plan.keep):  # if not, channels were pinned: fewer groups each turn
            return plan


def _check_width(min_width: object) -> None:
    if isinstance(min_width, bool) or not isinstance(min_width, int) or min_width < 1:
        raise PlanError(
            f"min_width {shown(min_width)} is not a positive integer; give the channels that a layer keeps at least"
        )


def check_shares(allocation: str, importance: str, *, measured: bool = True) -> None:
    """Raise unless there are such an allocation and importance.

    Args:
        allocation: As for `make_plan`.
        importance: As for `make_plan`.
        measured: Whether those that take data may be asked for.

    Raises:
        PlanError: If not.
    """
    for key, value, known, of_data in (
        ("allocation", allocation, ALLOCATIONS, "sensitivity"),
        ("importance", importance, IMPORTANCES, "taylor"),
    ):
        if not isinstance(value, str) or value not in known:
            raise PlanError(f"{key} {shown(value)} is unknown; choose one of {', '.join(known)}")
        if value == of_data and not measured:
            raise PlanError(
                f"{key} {value!r} takes data, and none is there before training starts; make the plan with make_plan,"
                f" which takes it, and pass it as plan= ({key}: {', '.join(k for k in known if k != of_data)})"
            )


def reachable(
    net: nn.Module,
    example: Any,
    method: str | Method | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    ignore: Patterns = (),
    static: Patterns = (),
    floors: Floors | None = None,
    min_width: int = 8,
    quantity: str = "macs",
    target: Target | None = None,
) -> Reach:
    """The range of MACs, or of ``params``, that `make_plan` can land in; ``target`` tells ``"auto"`` what costs are."""
    if quantity not in ("macs", "params"):
        raise PlanError(f"quantity {shown(quantity)} has no range; choose macs or params")
    _check_width(min_width)
    budget = Budget.parse(f"100% {quantity}" if target is None else target)
    method = _settled(asked_method(method, options, None), budget, budget.limit("latency") is not None)
    graph = Tracer(net, example, linear=getattr(method, "linear", False)).graph
    problem = Problem(net, graph, method, ignore, min_width, floors=floors, static=static)
    return problem.reach(quantity)


def asked_method(method: object, options: Mapping[str, Any] | None, paper: Preset | None) -> Method:
    """The method of `make_plan`'s arguments."""
    if paper is not None:
        return paper.configured(method, options)
    if isinstance(method, type) or not isinstance(method, Method):
        return configured(method, options)  # type: ignore[arg-type]  # what is no name is refused with the names
    if options:
        raise PlanError(
            f"options {shown(options)} are given beside a configured method {method}; give its name instead"
        )
    return method


def _settled(method: Method, budget: Budget | None, timed: bool) -> Method:
    """``auto`` with what it counts as costs: time, or else what the target limits."""
    limited = budget is not None and budget.limit("params") is not None
    if isinstance(method, Auto):
        method = method.settled("time" if timed else "params" if limited else "macs")
    return method


def _choice(op: Operation, method: Method, fixed: Mapping[str, str], first: str) -> Choice:
    assert op.spec is not None
    if op.module in fixed:
        return Choice(op.module, Static(), reason=fixed[op.module])
    if isinstance(method, Static):
        return Choice(op.module, method)
    if op.module == first:
        return Choice(op.module, Static(), reason="static: the first convolution, which reads the input")
    placed, reason = method.place(ConvSite(op.module, op.spec, op.positions))
    return Choice(op.module, placed, share_of(op, placed), reason)


def _paced(
    net: nn.Module,
    example: Any,
    problem: Problem,
    budget: Budget,
    how: tuple[str, float],
    table: LatencyTable,
    tracer: Tracer,
) -> Plan:
    """The plan for a limit on latency, or for others with banks only where the table says that they pay.

    A plan that the network does not run with is returned as it is: the tracer has another graph then.
    """

    def runs(plan: Plan) -> bool:
        return tracer.follows(plan.keep)

    prediction = Prediction(net, example, problem.graph, table)
    if budget.limit("latency") is None:
        first = problem.solve(budget, *how)
        problem.pace(prediction, first.widths)
        return problem.solve(budget, *how)
    pacer = Pacer(net, example, problem, prediction, budget, how)
    if not runs(prediction.half):
        return prediction.half
    first = pacer.first()
    if not runs(first):
        return first
    problem.pace(prediction, first.widths)
    return pacer.land(runs)
