"""The widths that lose least among those that land on the target.

A multiple-choice knapsack: every group chooses one width, every width loses something (its distance from an ideal, or
a measured drop), and together they must not cost more than the target. Steps are taken in the order of what they lose
per cost they save, which solves the linear relaxation of the problem; the prices of all steps are brought up to date
after each (`marginal`), since a channel less here makes channels elsewhere cheaper. Then the move of one group, or of
two at once, that lands within the tolerance below the target; then exchanges that lose less at an equal cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dyncompress.allocation import Widths, aligned
from dyncompress.marginal import Cost, Expansion

Array = np.ndarray
Rating = Callable[[Array, Array], Array]
"""Rates moves by the load that they lead to and by what they lose; the lowest is made, infinite ones are not."""

_PAIRS = 1200  # single moves whose pairs are looked through: a matrix of their square
_EXCHANGES = 32
_DETOURS = 64_000_000  # pairs looked through in all, where nothing lands at once


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
            if not any(move(self.fine, rate) for rate in (self._lands, self._nears) for move in (self._one, self._two)):
                return False
            self.visit(self.keep)  # the expansion promises; the cost model tells
        return self.landed(self.load)

    def _lands(self, load: Array, lost: Array) -> Array:
        """Rates moves that land, by what they lose."""
        return np.where((load >= 1 - self.tolerance) & (load <= 1), lost, np.inf)

    def _nears(self, load: Array, lost: Array) -> Array:
        """Rates moves that come nearer from below than anything before, by the distance left."""
        return np.where((load <= 1) & (load > self.reached + 1e-9) & np.isfinite(lost), 1 - load, np.inf)

    def _wins(self, load: Array, lost: Array) -> Array:
        """Rates moves that land and lose less than where we stand."""
        return np.where(lost < -1e-9, self._lands(load, lost), np.inf)

    def _one(self, grid: _Grid, rate: Rating) -> bool:
        """Make the move of lowest rating."""
        _, lost, changes = self._moves(grid)
        load = np.max([e.value + c for e, c in zip(self.near, changes, strict=True)], axis=0)
        return self._take(grid, rate(load, lost))

    # ---- moves of two groups -------------------------------------------------------------------------------------

    def _two(self, grid: _Grid, rate: Rating) -> bool:
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
        """Move one group, or widen one and narrow another, where that loses less."""
        self.visit(self.best)
        for grid in (self.coarse, self.fine):
            for _ in range(_EXCHANGES):
                if not (self._one(grid, self._wins) or self._two(grid, self._wins)):
                    break
                self.visit(self.keep)
                if self.best != self.keep:  # the expansion promised more than the cost model grants
                    self.visit(self.best)
                    break


def _ratio(lost: Array, gained: Array, allowed: Array) -> Array:
    """Loss per gain, infinite where a move isn't allowed or gains nothing."""
    allowed = allowed & (gained > 0) & np.isfinite(lost)
    return np.where(allowed, lost / np.where(allowed, gained, 1), np.inf)
