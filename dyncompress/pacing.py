"""Landing on a latency: the widths are searched by prediction, then real students are timed.

A prediction costs milliseconds where the table knows the layers; a real student is converted, folded and timed for
seconds. So predictions find the student, a measurement tells by how much they were off, and the search goes on with
that: two or three measurements, and the number that is kept is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from dyncompress.budget import Budget, Limit
from dyncompress.errors import BudgetError, PlanError, shown
from dyncompress.latency import device_of, measure_latency
from dyncompress.latencytable import Device, LatencyTable
from dyncompress.plan import Plan
from dyncompress.planfile import Pace
from dyncompress.prediction import Prediction, shipped, unchanged

NEAR = 0.04
"""A measured ratio this share below the target counts as landed: finer than the clock is on a shared machine."""
MEASUREMENTS = 4
ROUNDS = 200
"""Of a measurement, unless they take more than five seconds: a small network is timed often, so that its noise goes."""
_STEPS = 5  # predictions per search
_NEAR_PREDICTED = 0.02
_STEEPEST = 4.0


class Solver(Protocol):
    """What answers a target in MACs with a plan (`planning.Problem`)."""

    method: Any

    def solve(self, budget: Budget, allocation: str, tolerance: float) -> Plan:
        """The plan that lands on limits of MACs and parameters."""
        ...

    def reach(self) -> Any:
        """The MACs of the original, and of the narrowest and widest student."""
        ...


@dataclass(frozen=True)
class _Point:
    """A plan, the MACs that it was asked for, and its predicted time over the original's."""

    macs: float
    plan: Plan
    ratio: float


class Pacer:
    """Searches the widest student that is fast enough.

    Args:
        net: The network.
        example: What its ``forward`` takes.
        solver: Answers targets in MACs.
        prediction: Predicts times.
        budget: The target; one of its limits is on latency.
        how: How channels are shared out, and the tolerance of limits on MACs and parameters.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Any,
        solver: Solver,
        prediction: Prediction,
        budget: Budget,
        how: tuple[str, float],
    ) -> None:
        wanted = budget.limit("latency")
        assert wanted is not None
        self.net, self.example, self.solver, self.prediction = net, example, solver, prediction
        self.wanted, self.budget, self._how = wanted, budget, how
        self.others = tuple(limit for limit in budget.limits if limit.quantity not in ("latency", "macs"))
        self._original: nn.Module | None = None

    def first(self) -> Plan:
        """The student that is predicted to meet the target, or the narrowest.

        Raises:
            BudgetError: If the target's other limits are out of reach.
        """
        asked = self.budget.limit("macs")
        if asked is not None:
            self.solver.solve(Budget((asked, *self.others)), *self._how)
        return self.predicted(self.wanted.value, *self._ends()).plan

    def _ends(self) -> tuple[float, float]:
        """MACs of the narrowest and of the widest student that the other limits allow."""
        reach, asked = self.solver.reach(), self.budget.limit("macs")
        high = min(reach.original, reach.highest)
        return reach.lowest, high if asked is None else min(high, asked.absolute(reach.original))

    def predicted(self, goal: float, low: float, high: float) -> _Point:
        """The widest student that is predicted to take at most ``goal`` of the original's time, or the narrowest.

        Time rises about as a line with the MACs, so the next guess is where the line through the two nearest points
        meets the goal.
        """
        below, above = self._point(low), self._point(high)
        if below.ratio > goal or above.macs <= below.macs:
            return below
        if above.ratio <= goal:
            return above
        for _ in range(_STEPS):
            if below.ratio >= goal * (1 - _NEAR_PREDICTED):
                break
            share = (goal - below.ratio) / (above.ratio - below.ratio)
            share = min(0.9, max(0.1, share))  # never at an end: where the line is bent the range must shrink
            found = self._point(below.macs + share * (above.macs - below.macs))
            if found.ratio <= goal:
                below = found
            else:
                above = found
        return below

    def _point(self, macs: float) -> _Point:
        limits = (Limit(macs, False, "macs", self.wanted.text), *self.others)
        plan = self.solver.solve(Budget(limits), *self._how)
        return _Point(macs, plan, self.prediction.ratio(plan))

    def land(self, runs: Callable[[Plan], bool]) -> Plan:
        """The widest student whose measured time meets the target.

        Args:
            runs: Whether a plan's student runs; if not, it is returned unmeasured.

        Raises:
            BudgetError: If the narrowest is too slow.
        """
        wanted, (narrowest, widest) = self.wanted.value, self._ends()
        goal, low, high = wanted, narrowest, widest
        found: Plan | None = None
        fastest = float("inf")
        history: list[tuple[float, float]] = []
        for attempt in range(MEASUREMENTS + 1):
            last = attempt == MEASUREMENTS
            if last and found is not None:
                break
            point = self._point(narrowest) if last else self.predicted(goal, low, high)
            if found is not None and point.plan.widths == found.widths:
                break  # nothing is left between what is fast enough and what isn't
            if not runs(point.plan):
                return point.plan
            ratio = self._measured(point.plan)
            fastest = min(fastest, ratio)
            if ratio <= wanted:
                found, low = self._told(point, ratio), point.macs
            else:
                high = point.macs - 1
            if wanted * (1 - NEAR) <= ratio <= wanted or (found and low >= high) or high < narrowest:
                break
            history.append((point.ratio, ratio))
            goal = _aim(wanted * (1 - NEAR / 2), history)  # at the middle of what counts as landed
        if found is None:
            raise BudgetError(
                f"target '{self.wanted.text}' can't be reached with method '{self.solver.method.name}': the fastest"
                f" student that was measured takes {fastest:.0%} of the original's time at batch 1; ask for more, or"
                " try method 'static'"
            )
        return found

    def _measured(self, plan: Plan) -> float:
        if self._original is None:
            self._original = shipped(self.net, unchanged(plan.graph))
        nets = {"original": self._original, "student": shipped(self.net, plan)}
        return measure_latency(nets, self.example, batch_sizes=(1,), rounds=ROUNDS)["student"][1].ratio

    def _told(self, point: _Point, ratio: float) -> Plan:
        pace = Pace(round(point.ratio, 4), round(ratio, 4), str(self.prediction.table.device))
        return replace(point.plan, target=str(self.budget), latency=pace)


def _aim(wanted: float, history: Sequence[tuple[float, float]]) -> float:
    """What is to be predicted for ``wanted`` to be measured, by the (predicted, measured) ratios so far.

    After one measurement predictions are taken to be off by a factor, after two to lie on the line through both.

    Example:
        >>> round(_aim(0.6, [(0.5, 0.75)]), 3)
        0.4
        >>> round(_aim(0.6, [(0.5, 0.75), (0.4, 0.7)]), 3)
        0.2
    """
    predicted, measured = history[-1]
    if len(history) > 1:
        before, then = history[-2]
        slope = (measured - then) / (predicted - before) if predicted != before else 0.0
        if 1 / _STEEPEST < slope < _STEEPEST:  # else it is noise
            return predicted + (wanted - measured) / slope
    return predicted * wanted / measured


def table_for(net: nn.Module, table: LatencyTable | None, timed: bool) -> LatencyTable | None:
    """The table to plan with; the user's where none is given and the target is a time."""
    if table is None:
        dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
        return LatencyTable(Device.here(device_of(net), dtype)) if timed else None
    if not isinstance(table, LatencyTable):
        raise PlanError(
            f"table {shown(table)} is no latency table; give a dyncompress.latencytable.LatencyTable, or none"
        )
    if timed and table.device.batch != 1:
        raise PlanError(
            f"the latency table is of batch {table.device.batch}, and a target in latency is for batch 1; give a table"
            " of that, or none"
        )
    return table
