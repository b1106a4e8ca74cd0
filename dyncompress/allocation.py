"""How many channels each width group keeps, so that the whole network lands on its target.

First the ideal widths (the same ratio everywhere, or one importance threshold for all groups), then the nearest
aligned widths, then single steps, ever finer, until the cost lies within the tolerance below the target.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import permutations, product

import numpy as np

Widths = list[int]
QUANTA = (16, 8, 4, 2, 1)


def aligned(channels: int, floor: int, quantum: int) -> Widths:
    """Widths that run fast: 8, 16, 24, then multiples of 16 (quantum 16); or all multiples of a smaller quantum.

    A width between two of them leaves vector registers partly empty: a batched dynamic convolution runs slower.

    Example:
        >>> aligned(64, 8, 16)
        [8, 16, 24, 32, 48, 64]
    """
    steps = [8, *range(16, 25, 8), *range(32, channels, 16)] if quantum == 16 else range(quantum, channels, quantum)
    return sorted({floor, channels, *(s for s in steps if floor < s < channels)})


def uniform(channels: Sequence[int], floors: Sequence[int]) -> Callable[[float], Widths]:
    """The same ratio for every group: ``ideal(r) = r * channels``."""

    def ideal(ratio: float) -> Widths:
        return [max(f, min(c, round(ratio * c))) for c, f in zip(channels, floors, strict=True)]

    return ideal


def by_importance(scores: Sequence[np.ndarray], floors: Sequence[int]) -> Callable[[float], Widths]:
    """One threshold on the channels' scores for all groups: ``ideal(r)`` keeps the best ``r`` of all channels."""
    ranked = np.sort(np.concatenate(scores))[::-1] if scores else np.zeros(0)

    def ideal(ratio: float) -> Widths:
        last = min(int(ratio * len(ranked)), len(ranked) - 1)
        return [max(f, int((s >= ranked[last]).sum())) for s, f in zip(scores, floors, strict=True)]

    return ideal


def allocate(
    cost: Callable[[Widths], int],
    ideal: Callable[[float], Widths],
    channels: Sequence[int],
    floors: Sequence[int],
    target: float,
    tolerance: float,
    layers: Callable[[Widths], Sequence[int]] = tuple,
) -> Widths:
    """Widths whose cost lies in ``[(1 - tolerance) * target, target]``, as near to the ideal as steps allow.

    Args:
        cost: Cost of a network of these widths; it never falls when a width grows.
        ideal: Widths wanted at a ratio in [0, 1], growing with it.
        channels: Widths of the original.
        floors: Smallest widths allowed.
        target: Cost to land on.
        tolerance: Relative distance that still counts as landed.
        layers: Widths of the layers that result; as many of them as possible should be aligned.

    Returns:
        One width per group. Where no combination lies within the tolerance, the nearest that was found.
    """
    ratios = [i / 4096 for i in range(4097)]
    wanted = ideal(ratios[max(0, bisect_left(ratios, target, key=lambda r: cost(ideal(r))) - 1)])
    search = _Search(cost, layers, wanted, channels, floors, target, tolerance)
    found = [search.run(quantum) for quantum in QUANTA]
    landed = [keep for keep in found if search.landed(keep)]
    return (
        min(landed, key=search.departure) if landed else max(found, key=lambda keep: (cost(keep) <= target, cost(keep)))
    )


class _Search:
    """Moves by one step of a group's grid, each chosen by how little it departs from the ideal per cost it gains."""

    def __init__(
        self,
        cost: Callable[[Widths], int],
        layers: Callable[[Widths], Sequence[int]],
        wanted: Widths,
        channels: Sequence[int],
        floors: Sequence[int],
        target: float,
        tolerance: float,
    ) -> None:
        self.cost, self.layers, self.wanted, self.channels, self.floors = cost, layers, wanted, channels, floors
        self.target, self.tolerance = target, tolerance

    def run(self, coarsest: int) -> Widths:
        """From the nearest aligned widths, by steps of at most ``coarsest`` channels."""
        grid = self._grid(QUANTA[0])
        keep = [min(g, key=lambda x, w=w: (abs(x - w), -x)) for g, w in zip(grid, self.wanted, strict=True)]  # type: ignore[misc]
        for quantum in QUANTA[QUANTA.index(coarsest) :]:
            grid = [sorted({*a, *b}) for a, b in zip(grid, self._grid(quantum), strict=True)]
            keep = self.climb(self.descend(keep, grid), grid)
            if self.landed(keep):
                return keep
        return self.swap(keep, grid)

    def _grid(self, quantum: int) -> list[Widths]:
        return [aligned(c, f, quantum) for c, f in zip(self.channels, self.floors, strict=True)]

    def departure(self, keep: Widths) -> float:
        """Distance from the ideal, plus the share of layers whose width is unaligned: they run slower."""
        widths = self.layers(keep)
        unaligned = sum(w not in aligned(w + 1, 8, QUANTA[0]) for w in widths) / max(len(widths), 1)
        return math.sqrt(sum(self._penalty(g, k) for g, k in enumerate(keep))) + unaligned

    def landed(self, keep: Widths) -> bool:
        return (1 - self.tolerance) * self.target <= self.cost(keep) <= self.target

    def _penalty(self, group: int, width: int) -> float:
        return ((width - self.wanted[group]) / self.channels[group]) ** 2

    def _moves(self, keep: Widths, grid: list[Widths], step: int) -> list[tuple[Widths, float, int]]:
        here = self.cost(keep)
        found = []
        for g, width in enumerate(keep):
            at = grid[g].index(width) + step
            if 0 <= at < len(grid[g]):
                moved = [*keep[:g], grid[g][at], *keep[g + 1 :]]
                change = self.cost(moved) - here
                if change:
                    found.append((moved, self._penalty(g, grid[g][at]) - self._penalty(g, width), change))
        return found

    def descend(self, keep: Widths, grid: list[Widths]) -> Widths:
        """Narrow until the target is met."""
        while self.cost(keep) > self.target:
            moves = self._moves(keep, grid, -1)
            if not moves:
                break
            over = self.cost(keep) - self.target
            enough = [m for m in moves if -m[2] >= over]  # the last move: the gentlest that gets there
            keep = min(enough, key=lambda m: m[1])[0] if enough else min(moves, key=lambda m: m[1] / -m[2])[0]
        return keep

    def climb(self, keep: Widths, grid: list[Widths]) -> Widths:
        """Widen while the target allows."""
        while not self.landed(keep):
            room = self.target - self.cost(keep)
            moves = [m for m in self._moves(keep, grid, +1) if 0 < m[2] <= room]
            if not moves:
                break
            keep = min(moves, key=lambda m: m[1] / m[2])[0]
        return keep

    def swap(self, keep: Widths, grid: list[Widths]) -> Widths:
        """Widen one group and narrow another where single steps stop short."""
        best, far = (
            keep,
            4 if len(keep) <= 12 else 1,
        )  # many groups leave many single steps: a short look will do
        for up, down in permutations(range(len(keep)), 2):
            for i, j in product(range(1, far + 1), repeat=2):
                above, below = grid[up].index(keep[up]) + i, grid[down].index(keep[down]) - j
                if above >= len(grid[up]) or below < 0:
                    continue
                moved = list(keep)
                moved[up], moved[down] = grid[up][above], grid[down][below]
                if self.cost(best) < self.cost(moved) <= self.target:
                    best = moved
                    if self.landed(best):
                        return best
        return best
