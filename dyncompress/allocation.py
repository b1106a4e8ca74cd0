"""How many channels each width group keeps, so that the whole network lands on its target.

A multiple-choice knapsack: every group chooses one width, every width loses something (`near` an ideal, or a measured
drop), and the widths together must not cost more than the target. Steps are taken in the order of what they lose per
cost they save, which solves the linear relaxation of the problem, with the prices of all steps brought up to date
after each (`marginal`). Then the nearest move of one group, or of two at once, that lands within the tolerance below
the target; then exchanges that lose less at an equal cost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dyncompress.marginal import Expansion

Array = np.ndarray
Widths = list[int]
_UNALIGNED = 1 / 8
"""An unaligned width is as bad as one that is off its ideal by this share of the group."""
_PAIRS = 1200  # single moves whose pairs are looked through: a matrix of their square
_EXCHANGES = 32
_DETOURS = 64_000_000  # pairs looked through in all, where nothing lands at once


class Cost(Protocol):
    """A cost as a function of the widths; it never falls when a width grows."""

    def exact(self, keep: Sequence[int]) -> int:
        """The cost."""
        ...

    def expand(self, keep: Sequence[int]) -> Expansion:
        """The cost nearby."""
        ...


def aligned(channels: int, floor: int, each: int = 1) -> Widths:
    """Widths that run fast: 8, 16, 24, then multiples of 16, between floor and channels.

    A width between two of them leaves vector registers partly empty: a batched dynamic convolution runs slower.

    Args:
        channels: Width of the original.
        floor: Smallest width allowed.
        each: Channels of a layer per channel of the group (the groups of a grouped convolution).

    Example:
        >>> aligned(64, 8)
        [8, 16, 24, 32, 48, 64]
        >>> aligned(8, 2, each=4)
        [2, 4, 6, 8]
    """
    fast = (w for w in range(floor + 1, channels) if w * each in (8, 24) or w * each % 16 == 0)
    return sorted({floor, channels, *fast})


def uniform(channels: Sequence[int], floors: Sequence[int]) -> Callable[[float], Widths]:
    """The same ratio for every group: ``ideal(r) = r * channels``."""

    def ideal(ratio: float) -> Widths:
        return [max(f, min(c, round(ratio * c))) for c, f in zip(channels, floors, strict=True)]

    return ideal


def by_importance(scores: Sequence[Array], floors: Sequence[int]) -> Callable[[float], Widths]:
    """One threshold on the channels' scores for all groups: ``ideal(r)`` keeps the best ``r`` of all channels."""
    ranked = np.sort(np.concatenate(scores))[::-1] if scores else np.zeros(0)

    def ideal(ratio: float) -> Widths:
        last = min(int(ratio * len(ranked)), len(ranked) - 1)
        return [max(f, int((s >= ranked[last]).sum())) for s, f in zip(scores, floors, strict=True)]

    return ideal


def affordable(ideal: Callable[[float], Widths], costs: Sequence[Cost], targets: Sequence[float]) -> Widths:
    """The widest ideal that exceeds no target."""

    def over(ratio: float) -> bool:
        keep = ideal(ratio)
        return any(cost.exact(keep) > target for cost, target in zip(costs, targets, strict=True))

    ratios = [i / 4096 for i in range(4097)]
    return ideal(ratios[max(0, bisect_left(ratios, True, key=over) - 1)])


def near(ideal: Sequence[int], channels: Sequence[int], each: Sequence[int]) -> list[Array]:
    """What a width loses by its distance from the ideal and by being unaligned, for widths 0 to channels."""
    losses = []
    for wanted, c, per in zip(ideal, channels, each, strict=True):
        loss = ((np.arange(c + 1) - wanted) / c) ** 2 + _UNALIGNED**2
        loss[aligned(c, 0, per)] -= _UNALIGNED**2
        losses.append(loss)
    return losses


def allocate(
    costs: Sequence[Cost],
    targets: Sequence[float],
    losses: Sequence[Array],
    floors: Sequence[int],
    tolerance: float,
    each: Sequence[int] | None = None,
) -> Widths:
    """Widths that lose least among those whose cost lands on the target.

    Minimises ``sum of losses[g][width of g]`` where every ``cost <= target`` and one of them is at least
    ``(1 - tolerance) * target``.

    Args:
        costs: What is limited.
        targets: The limits.
        losses: Per group, what keeping 0, 1, 2 ... channels loses; its length is the group's width and one.
        floors: Smallest widths allowed; they exceed no target.
        tolerance: Relative distance that still counts as landed.
        each: Channels of a layer per channel of the group, for alignment.

    Returns:
        One width per group. Where no combination was found within the tolerance, the nearest below.
    """
    return _Search(costs, targets, losses, floors, tolerance, each or [1] * len(floors)).run()


class _Grid:
    """Widths to choose from, and what each loses: arrays of one row per group, padded."""

    def __init__(self, rows: Sequence[Sequence[int]], losses: Sequence[Array]) -> None:
        size = max(map(len, rows))
        self.widths = np.array([[*row, *[row[0]] * (size - len(row))] for row in rows])
        self.losses = np.full(self.widths.shape, np.inf)
        for g, row in enumerate(rows):
            self.losses[g, : len(row)] = losses[g][list(row)]


class _Search:
    """Widths, the cost around them as a share of the target, and moves to other widths."""

    def __init__(
        self,
        costs: Sequence[Cost],
        targets: Sequence[float],
        losses: Sequence[Array],
        floors: Sequence[int],
        tolerance: float,
        each: Sequence[int],
    ) -> None:
        self.costs, self.targets, self.losses, self.tolerance = costs, targets, losses, tolerance
        self.floors = list(floors)
        channels = [len(loss) - 1 for loss in losses]
        self.all = range(len(channels))
        if channels:
            spans = list(zip(channels, floors, each, strict=True))
            self.coarse = _Grid([aligned(c, f, per) for c, f, per in spans], losses)
            self.fine = _Grid([range(f, c + 1) for c, f, _ in spans], losses)
        self.best, self.reached = self.floors, 0.0
        self.keep, self.near = self.floors, []  # type: Widths, list[Expansion]

    def run(self) -> Widths:
        """Search; the best that was seen and exceeds no target."""
        if not self.all:
            return []
        self.visit([f + int(np.argmin(loss[f:])) for f, loss in zip(self.floors, self.losses, strict=True)])
        self.descend()
        self.climb()
        self.visit(self.keep)
        settled = self.keep
        if not self.land():
            for start in (settled, [len(loss) - 1 for loss in self.losses], self.floors):
                if self.detour(start):
                    break
        if self.landed(self.reached):
            self.exchange()
        return self.best

    # ---- where we stand ------------------------------------------------------------------------------------------

    def visit(self, keep: Widths) -> None:
        """Stand at some widths, with costs from the cost model; remember them where they are the best so far."""
        self.keep = list(keep)
        self.near = []
        for cost, target in zip(self.costs, self.targets, strict=True):
            found = cost.expand(keep)
            self.near.append(Expansion(found.value / target, found.slope / target, found.curvature / target))
        load = self.load
        better = self.loss(self.keep) < self.loss(self.best) if self.landed(self.reached) else load > self.reached
        if load <= 1 and better and (self.landed(load) or not self.landed(self.reached)):
            self.best, self.reached = self.keep, load

    @property
    def load(self) -> float:
        """Cost over target, of the limit that is nearest to being broken."""
        return max(e.value for e in self.near)

    def landed(self, load: float) -> bool:
        return 1 - self.tolerance <= load <= 1

    def loss(self, keep: Widths) -> float:
        return float(sum(loss[w] for loss, w in zip(self.losses, keep, strict=True)))

    def move(self, group: int, width: int) -> None:
        for e in self.near:
            e.move(group, width - self.keep[group])
        self.keep = [*self.keep[:group], width, *self.keep[group + 1 :]]

    # ---- moves of one group --------------------------------------------------------------------------------------

    def _moves(self, grid: _Grid) -> tuple[Array, Array, list[Array]]:
        """Change of width, loss, and every cost's share, for each entry of a grid."""
        deltas = grid.widths - np.array(self.keep)[:, None]
        here = np.array([loss[w] for loss, w in zip(self.losses, self.keep, strict=True)])
        return deltas, grid.losses - here[:, None], [e.steps(deltas) for e in self.near]

    def _take(self, grid: _Grid, rating: Array) -> bool:
        """Make the move of lowest rating; False where every one is ruled out."""
        at = np.unravel_index(np.argmin(rating), rating.shape)
        if not rating[at] < np.inf:
            return False
        self.move(int(at[0]), int(grid.widths[at]))
        return True

    def descend(self) -> None:
        """Narrow by what is lost per cost saved, until no target is exceeded."""
        for grid in (self.coarse, self.fine):
            while self.load > 1:
                deltas, lost, changes = self._moves(grid)
                # A step saves no more than is asked: what it saves beyond that is no merit.
                saved = sum(np.minimum(-c, e.value - 1) for e, c in zip(self.near, changes, strict=True) if e.value > 1)
                if not self._take(grid, _ratio(lost, saved, deltas < 0)):
                    break

    def climb(self) -> None:
        """Widen by what is lost, or won, per cost added, while the target allows."""
        for _ in range(self.coarse.widths.size):
            if self.landed(self.load):
                return
            deltas, lost, changes = self._moves(self.coarse)
            fits = np.all([e.value + c <= 1 for e, c in zip(self.near, changes, strict=True)], axis=0)
            binding = max(range(len(self.near)), key=lambda q: self.near[q].value)
            if not self._take(self.coarse, _ratio(lost, changes[binding], fits & (deltas > 0))):
                return

    def land(self) -> bool:
        """Move one group, or two, so that the cost lies within the tolerance, or as near below as moves allow."""
        for _ in range(6):
            if self.landed(self.load):
                return True
            if not any(move(nearest) for nearest in (False, True) for move in (self._one, self._two)):
                return False
            self.visit(self.keep)  # the expansion promises; the cost model tells
        return self.landed(self.load)

    def _one(self, nearest: bool) -> bool:
        _, lost, changes = self._moves(self.fine)
        load = np.max([e.value + c for e, c in zip(self.near, changes, strict=True)], axis=0)
        return self._take(self.fine, self._rated(load, np.where(np.isfinite(lost), lost, np.inf), nearest))

    def _rated(self, load: Array, lost: Array, nearest: bool) -> Array:
        """Loss of the moves that land; or the distance left by those that come nearer from below."""
        if nearest:
            return np.where((load <= 1) & (load > self.reached + 1e-9) & np.isfinite(lost), 1 - load, np.inf)
        return np.where((load >= 1 - self.tolerance) & (load <= 1), lost, np.inf)

    # ---- moves of two groups -------------------------------------------------------------------------------------

    def _two(self, nearest: bool) -> bool:
        return self._pair(self.fine, lambda load, lost: self._rated(load, lost, nearest))

    def _pair(self, grid: _Grid, rate: Callable[[Array, Array], Array]) -> bool:
        """Make the pair of moves of lowest rating, among the moves to near widths."""
        deltas, lost, changes = self._moves(grid)
        usable = np.where(np.isfinite(lost) & (deltas != 0), np.abs(deltas), np.inf)
        columns = np.argsort(usable, axis=1, kind="stable")[:, : max(2, _PAIRS // len(self.keep))]
        rows = np.broadcast_to(np.arange(len(self.keep))[:, None], columns.shape)
        chosen = np.isfinite(usable[rows, columns])
        rows, columns = rows[chosen], columns[chosen]
        if not len(rows):
            return False
        d, l1 = deltas[rows, columns].astype(float), lost[rows, columns]
        load = np.full((len(d), len(d)), -np.inf)
        for e, change in zip(self.near, changes, strict=True):
            c = change[rows, columns]
            both = e.value + c[:, None] + c + e.curvature[rows[:, None], rows] * d[:, None] * d
            np.maximum(load, both, out=load)
        rating = rate(load, np.where(rows[:, None] < rows, l1[:, None] + l1, np.inf))
        pair = np.unravel_index(np.argmin(rating), rating.shape)
        if not rating[pair] < np.inf:
            return False
        for at in pair:
            self.move(int(rows[at]), int(grid.widths[rows[at], columns[at]]))
        return True

    def detour(self, start: Widths) -> bool:
        """Where no move of one or two groups lands: a third is moved first, nearest widths first."""
        self.visit(start)
        deltas, lost, _ = self._moves(self.fine)
        steps = np.where(np.isfinite(lost) & (deltas != 0), np.abs(deltas), np.inf)
        possible = int(np.isfinite(steps).sum())
        tries = min(possible, _DETOURS // min(max(possible, 1), _PAIRS) ** 2)
        for flat in np.argsort(steps, axis=None, kind="stable")[:tries]:
            group, column = np.unravel_index(flat, steps.shape)
            keep = list(start)
            keep[group] = int(self.fine.widths[group, column])
            self.visit(keep)
            if self.land():
                return True
        return False

    def exchange(self) -> None:
        """Widen one group and narrow another where that loses less."""
        self.visit(self.best)

        def gain(load: Array, lost: Array) -> Array:
            return np.where(lost < -1e-9, self._rated(load, lost, nearest=False), np.inf)

        for grid in (self.coarse, self.fine):
            for _ in range(_EXCHANGES):
                if not self._pair(grid, gain):
                    break
                self.visit(self.keep)
                if self.best != self.keep:  # the expansion promised more than the cost model grants
                    self.visit(self.best)
                    break


def _ratio(lost: Array, gained: Array, allowed: Array) -> Array:
    """Loss per gain, infinite where a move isn't allowed or gains nothing."""
    allowed = allowed & (gained > 0) & np.isfinite(lost)
    return np.where(allowed, lost / np.where(allowed, gained, 1), np.inf)
