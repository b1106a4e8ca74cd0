"""Which channels belong together: the bookkeeping behind the channel graph.

Every channel of every parameter gets an integer *label*. Running the network once tells which labels must share
one fate: they are *tied* (a residual add ties its two operands), or *pinned* (a channel of the network's output
can't be cut). `Ledger` collects both while the network runs; `classes` closes the ties at the end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Maps = tuple[Tensor, ...]
"""Labels of one tensor: int64 maps of the tensor's own shape, one per dimension that can be cut. 0 is 'fixed'."""


def varies(labels: Tensor) -> list[int]:
    """Dimensions along which a compact map changes (see `compact`)."""
    return [d for d in range(labels.dim()) if labels.shape[d] > 1 and labels.stride(d) != 0]


def compact(labels: Tensor) -> Tensor:
    """The same map with stride 0 along every dimension that it does not change along.

    Keeps maps of large activations as small as their number of channels, and makes `varies` a look at strides.
    """
    shape = labels.shape
    for d in reversed(range(labels.dim())):
        if shape[d] > 1 and labels.stride(d) != 0:
            first = labels.narrow(d, 0, 1)
            if bool((labels == first).all()):
                labels = first
        elif shape[d] > 1:
            labels = labels.narrow(d, 0, 1)
    return labels.expand(shape)


def core(labels: Tensor) -> Tensor:
    """Flattened values of a map, at one position per dimension that it doesn't change along."""
    return cores(labels)[0]


def cores(*maps: Tensor) -> list[Tensor]:
    """Flattened values of maps of one shape, at one position per dimension that none of them changes along."""
    keep = {d for m in maps for d in varies(m)}
    parts = []
    for m in maps:
        for d in range(m.dim()):
            if d not in keep:
                m = m.narrow(d, 0, min(1, m.shape[d]))
        parts.append(m.reshape(-1))
    return parts


class Ledger:
    """Labels handed out, and what was learned about them."""

    def __init__(self) -> None:
        self._next = 1
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._pins: list[tuple[np.ndarray, str]] = []
        self._uniform: list[tuple[np.ndarray, str]] = []

    def copy(self) -> Ledger:
        """A ledger that goes on from here."""
        twin = Ledger()
        twin._next = self._next
        twin._ties, twin._pins, twin._uniform = [*self._ties], [*self._pins], [*self._uniform]
        return twin

    def fresh(self, count: int) -> Tensor:
        """New labels, one per channel."""
        ids = torch.arange(self._next, self._next + count)
        self._next += count
        return ids

    def tie_maps(self, a: Tensor, b: Tensor, reason: str) -> None:
        """`tie` for maps of one shape."""
        left, right = cores(a, b)
        self.tie(left, right, reason)

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Channels of equal position share one fate; a channel that meets a fixed one is pinned."""
        left, right = (m.numpy().ravel() for m in torch.broadcast_tensors(a, b))
        fixed = (left == 0) ^ (right == 0)
        if fixed.any():
            self._pins.append((np.where(left == 0, right, left)[fixed], reason))
        free = (left != 0) & (right != 0) & (left != right)
        if free.any():
            self._ties.append((left[free], right[free]))

    def pin(self, ids: Tensor, reason: str) -> None:
        """These channels can't be cut."""
        found = np.unique(ids.numpy())
        found = found[found != 0]
        if found.size:
            self._pins.append((found, reason))

    def require_uniform(self, ids: Tensor, reason: str) -> None:
        """Pin these channels unless the ties turn them all into one class (known only at the end)."""
        found = np.unique(ids.numpy())
        if found.size > 1:
            self._uniform.append((found, reason))

    def classes(self) -> tuple[np.ndarray, dict[int, str]]:
        """Close the ties.

        Returns:
            The class of every label (array indexed by label; 0 stays 0), and why each pinned class is pinned.
        """
        parent = np.arange(self._next)
        if self._ties:
            a = np.concatenate([t[0] for t in self._ties])
            b = np.concatenate([t[1] for t in self._ties])
            while True:  # hook the larger root under the smaller one, then shorten paths; ends in O(log n) rounds
                pa, pb = parent[a], parent[b]
                low, high = np.minimum(pa, pb), np.maximum(pa, pb)
                if (low == high).all():
                    break
                np.minimum.at(parent, high, low)
                while True:
                    shorter = parent[parent]
                    if (shorter == parent).all():
                        break
                    parent = shorter
        pinned: dict[int, str] = {}
        late = [(ids, reason) for ids, reason in self._uniform if np.unique(parent[ids[ids != 0]]).size > 1]
        for ids, reason in self._pins + late:
            for c in np.unique(parent[ids[ids != 0]]):
                pinned.setdefault(int(c), reason)
        return parent, pinned
