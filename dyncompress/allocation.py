"""What widths to aim at: the ideal ones, and what every other width of a group loses against them.

``uniform`` wants the same ratio everywhere, ``by_importance`` one threshold on the channels' scores; both as wide as
the target allows. An integer width that is near, aligned and affordable is then chosen by `knapsack`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from dyncompress.graph import ConvGraph, extent
from dyncompress.marginal import Cost

Array = np.ndarray
Widths = list[int]
_UNALIGNED = 1 / 6
"""An unaligned width is as bad as one that is off its ideal by this share of the group. In a batch of 32 it makes a
dynamic convolution twice as slow: 8 of 16 channels are worth more than 9 (CIFAR ResNet-20 at 33 %, `make bench`)."""


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


def multiples(graph: ConvGraph) -> list[int]:
    """Per group, channels of a layer's output per channel of the group."""
    found = [1] * len(graph.groups)
    for op in graph.convs:
        runs = graph.axes.get(f"{op.weight}:0", ())
        for group, each in extent(runs)[1]:
            found[group] = max(found[group], each)
    return found
