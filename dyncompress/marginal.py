"""What one channel more or less costs: the second-order expansion of a network's cost around given widths.

Every product in a network costs its input's width times its output's, and both are sums of group widths. So the cost
is quadratic in the widths, and its expansion

    cost(w + d) = value + slope . d + d . curvature . d / 2

is the cost itself for static networks, exact at ``w`` for any method, and prices every step of a search at once, in a
few operations on small arrays. `CostModel` stays the truth: what a search arrives at is asked of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dyncompress.cost import CostModel
from dyncompress.graph import Extent, extent

Array = np.ndarray


@dataclass
class Expansion:
    """Cost near some widths.

    Attributes:
        value: The cost there.
        slope: Per group, what a channel costs.
        curvature: Per pair of groups, by how much a channel of the one makes a channel of the other dearer.
    """

    value: float
    slope: Array
    curvature: Array

    def steps(self, deltas: Array) -> Array:
        """Change of the cost when one group g alone changes by ``deltas[g, k]``."""
        change: Array = self.slope[:, None] * deltas + np.diag(self.curvature)[:, None] * deltas**2 / 2
        return change

    def move(self, group: int, delta: float) -> None:
        """Expand around the widths with one group changed."""
        self.value += float(self.slope[group] * delta + self.curvature[group, group] * delta**2 / 2)
        self.slope = self.slope + self.curvature[:, group] * delta


class Cost(Protocol):
    """A cost as a function of the widths; it never falls when a width grows."""

    def exact(self, keep: Sequence[int]) -> int:
        """The cost."""
        ...

    def expand(self, keep: Sequence[int]) -> Expansion:
        """The cost nearby."""
        ...


class Terms:
    """A cost as a sum of products of extents; the factors of replaced layers are read off the cost model.

    Args:
        model: Cost of the network as a function of its widths.
        quantity: ``macs`` or ``params``.
    """

    def __init__(self, model: CostModel, quantity: str) -> None:
        self._model, self._quantity = model, quantity
        graph = model.graph
        self._replaced = {op.module: (_varying(op.axes), f"{op.module}.bias:0") for op in graph.convs}
        self._fixed: dict[tuple[Extent, ...], float] = defaultdict(float)
        if quantity == "macs":
            for op in graph.operations:
                if op.spec is None:
                    self._add(op.fixed, op.axes)
        else:
            weights = {op.weight for op in graph.convs}
            for name, shape in graph.parameters.items():
                if name not in weights:
                    keys = [f"{name}:{d}" for d in range(len(shape))]
                    count = math.prod(s for s, key in zip(shape, keys, strict=True) if key not in graph.axes)
                    self._add(count, [extent(graph.axes[key]) for key in keys if key in graph.axes])

    def _add(self, count: float, extents: Sequence[Extent]) -> None:
        factors = _varying(extents)
        constant = math.prod(fixed for fixed, parts in extents if not parts)
        if factors:
            self._fixed[factors] += count * constant

    def exact(self, keep: Sequence[int]) -> int:
        """The cost, by the cost model."""
        return int(getattr(self._model, self._quantity)(keep))

    def _length(self, axis: str, keep: Sequence[int]) -> int:
        """Size of an axis; 0 where there is no such parameter."""
        graph = self._model.graph
        if axis in graph.axes:
            return _size(extent(graph.axes[axis]), keep)
        return next(iter(graph.parameters.get(axis.rpartition(":")[0], (0,))))

    def expand(self, keep: Sequence[int]) -> Expansion:
        """The expansion around some widths."""
        factors = defaultdict(float, self._fixed)
        for name, (macs, params) in self._model.layers(keep).items():
            extents, bias = self._replaced[name]
            if extents:
                cost = macs.total if self._quantity == "macs" else params - self._length(bias, keep)
                factors[extents] += cost / math.prod(_size(e, keep) for e in extents)
        groups = len(keep)
        slope, curvature = np.zeros(groups), np.zeros((groups, groups))
        for extents, factor in factors.items():
            sizes = [_size(e, keep) for e in extents]
            for i, (_, parts) in enumerate(extents):
                rest = factor * math.prod(sizes[:i] + sizes[i + 1 :])
                for group, each in parts:
                    slope[group] += rest * each
                for j in range(i):
                    _couple(curvature, rest / sizes[j], parts, extents[j][1])
        return Expansion(float(self.exact(keep)), slope, curvature)


def _couple(curvature: Array, factor: float, left: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]]) -> None:
    for g, a in left:
        for h, b in right:
            curvature[g, h] += factor * a * b
            curvature[h, g] += factor * a * b


def _varying(extents: Sequence[Extent]) -> tuple[Extent, ...]:
    return tuple(e for e in extents if e[1])


def _size(size: Extent, keep: Sequence[int]) -> int:
    fixed, parts = size
    return fixed + sum(keep[group] * each for group, each in parts)
