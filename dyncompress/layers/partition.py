"""How kernels are cut in cells, and how many of a warehouse's cells each layer brings: integer arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dyncompress.layers.spec import ConvSite

__all__ = ["Grid", "Store", "stored"]

# A layer of m cells has a router of m (n + 1) rows in a warehouse of n. In the authors' networks a whole divisor cuts a
# kernel in 32 cells at most, and warehouses have 552. Widths that share a small divisor only (37 and 75: 1) would make
# far more.
_MOST_PIECES, _MOST_CELLS = 32, 1024
_FEWEST_CELLS = 4  # in the authors' networks; the only one there is could be scaled, and hardly that
_ROUNDING = 1e-9  # 0.1 * 30 is more than 3


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

    ``members`` are the layers, by their place among those that were asked for. ``owners`` has, per layer and cell that
    it brings, the place in the layer's kernel that the cell holds at first, or -1 for none.
    """

    out: int
    into: int
    members: list[int]
    grids: list[Grid]
    owners: list[list[int]]

    @property
    def cells(self) -> int:
        """All of them, n."""
        return sum(map(len, self.owners))


def stored(sites: Sequence[ConvSite], ratio: float, cell: tuple[float, float], mixing: float = math.inf) -> list[Store]:
    """The warehouses of some layers: one where their widths divide well and maps are large, several elsewhere.

    Cells are 1x1 in space, and as wide as the common divisor of the layers' widths, times ``cell``. In the order of the
    layers, each joins the first warehouse that can take it, or begins another. One can where the divisor then still
    cuts every kernel in 32 cells at most (or in those that it has in space, one for each), where it has no more than
    1,024, and where no layer mixes more of them than ``mixing`` times its output positions: mixing n cells costs a
    layer what n positions do. So an odd width costs the other layers nothing. Where a warehouse then has fewer than 4
    cells, as that of a pointwise layer alone has, they are halved, the longer side first.

    Args:
        sites: The layers.
        ratio: Cells of a warehouse over those of its kernels: an integer, or one over an integer.
        cell: Parts of the common divisor of the output and the input channels.
        mixing: Multiply-adds of mixing over those of the convolution that layers share for; alone, one may have more.

    Example:
        >>> from dyncompress.layers.spec import ConvSpec
        >>> sites = [ConvSite("conv", ConvSpec(16, wide, (3, 3)), positions=64) for wide in (16, 9, 32)]
        >>> [(store.members, store.out, store.into) for store in stored(sites, 1, (1, 1))]
        [([0, 2], 16, 16), ([1], 9, 16)]
    """
    shared: list[list[int]] = []
    for index, site in enumerate(sites):
        for each in shared:
            if _can_share([*(sites[i] for i in each), site], ratio, cell, mixing):
                each.append(index)
                break
        else:
            shared.append([index])
    return [_store(each, [sites[i] for i in each], ratio, cell) for each in shared]


def _can_share(sites: Sequence[ConvSite], ratio: float, cell: tuple[float, float], mixing: float) -> bool:
    whole = _sides(sites, (1, 1))
    if any(grid.pieces > max(grid.space, _MOST_PIECES) for grid in (_grid(site, *whole) for site in sites)):
        return False
    count = _count(sites, *_sides(sites, cell))
    return count <= _MOST_CELLS and count * ratio <= mixing * min(site.positions for site in sites)


def _store(members: list[int], sites: Sequence[ConvSite], ratio: float, cell: tuple[float, float]) -> Store:
    sides = _sides(sites, cell)
    widths = [max(site.spec.weight_shape[axis] for site in sites) for axis in (0, 1)]
    while _cells(sites, sides, ratio) < _FEWEST_CELLS and max(sides) > 1:
        longer = sides.index(max(sides))
        sides[longer] = -(-sides[longer] // 2)
    # A layer alone has too many cells where ``cell`` is small: they are as wide as it takes, and may overhang.
    while _count(sites, *sides) > _MOST_CELLS and any(s < w for s, w in zip(sides, widths, strict=True)):
        finest = max((0, 1), key=lambda axis: widths[axis] / sides[axis])
        sides[finest] *= 2
    grids = [_grid(site, *sides) for site in sites]
    return Store(sides[0], sides[1], members, grids, [_owners(grid.pieces, ratio) for grid in grids])


def _cells(sites: Sequence[ConvSite], sides: Sequence[int], ratio: float) -> int:
    return sum(len(_owners(_grid(site, *sides).pieces, ratio)) for site in sites)


def _sides(sites: Sequence[ConvSite], cell: tuple[float, float]) -> list[int]:
    """Output and input channels of a cell; of an odd divisor, the larger half."""
    divisors = (math.gcd(*(site.spec.weight_shape[axis] for site in sites)) for axis in (0, 1))
    return [max(math.ceil(divisor * part - _ROUNDING), 1) for divisor, part in zip(divisors, cell, strict=True)]


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
