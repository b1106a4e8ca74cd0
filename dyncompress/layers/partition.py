"""How kernels are cut in cells, and how many of a warehouse's cells each layer brings: integer arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dyncompress.layers.spec import ConvSite

__all__ = ["Grid", "Store", "stored"]

# A layer of m cells has a router of m (n + 1) rows in a warehouse of n. The authors have 552 cells at most, and those
# of 1/18 of the widest layer at least. Widths that share a small divisor only (37 and 75: 1) would make far more.
_MOST_CELLS, _SMALLEST_CELL = 1024, 24


class Grid(NamedTuple):
    """How many cells a kernel has: in space, along the output channels, along the input channels."""

    space: int
    out: int
    into: int

    @property
    def pieces(self) -> int:
        """All of them, m."""
        return self.space * self.out * self.into


class Store(NamedTuple):
    """A warehouse: cells of [out, into] weights, and per layer how its kernel is cut and which cells it brings.

    ``owners`` has, per layer and cell that it brings, the place in the layer's kernel that the cell holds at first, or
    -1 for none.
    """

    out: int
    into: int
    grids: list[Grid]
    owners: list[list[int]]

    @property
    def cells(self) -> int:
        """All of them, n."""
        return sum(map(len, self.owners))


def stored(sites: Sequence[ConvSite], ratio: float, cell: tuple[float, float]) -> Store:
    """The warehouse of some layers.

    Cells are as wide as the common divisor of the layers' widths, times ``cell``; 1x1 in space. Where that is below
    1/24 of the widest layer they are as wide as the narrowest, and where there are still more than 1,024 cells, twice
    as wide or more; then they overhang some kernels.

    Args:
        sites: The layers.
        ratio: Cells of the warehouse over those of all kernels: an integer, or one over an integer.
        cell: Parts of the common divisor of the output and the input channels.
    """
    widths = [[site.spec.weight_shape[axis] for site in sites] for axis in (0, 1)]
    sides = [_side(each, part) for each, part in zip(widths, cell, strict=True)]
    while _count(sites, *sides) > _MOST_CELLS and any(s < max(each) for s, each in zip(sides, widths, strict=True)):
        finest = max((0, 1), key=lambda axis: max(widths[axis]) / sides[axis])
        sides[finest] *= 2
    grids = [_grid(site, *sides) for site in sites]
    return Store(sides[0], sides[1], grids, [_owners(grid.pieces, ratio) for grid in grids])


def _side(widths: Sequence[int], part: float) -> int:
    divisor = math.gcd(*widths)
    if divisor * _SMALLEST_CELL < max(widths):
        divisor = min(widths)
    return max(int(divisor * part), 1)


def _grid(site: ConvSite, out: int, into: int) -> Grid:
    wide, deep, *kernel = site.spec.weight_shape
    return Grid(math.prod(kernel), -(-wide // out), -(-deep // into))


def _count(sites: Sequence[ConvSite], out: int, into: int) -> int:
    return sum(_grid(site, out, into).pieces for site in sites)


def _owners(count: int, ratio: float) -> list[int]:
    if ratio >= 1:
        return [i if r == 0 else -1 for i in range(count) for r in range(round(ratio))]
    q = round(1 / ratio)
    return [i for i in range(count) if i % q == (i // q) % q]
