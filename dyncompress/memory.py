"""Labels of tensors that are written in parts (``out[:, :k] = y``): by memory, so that every view sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyncompress.labels import Maps, compact, varies


class Memory:
    """What is known of the memory behind tensors."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor in it, labels of its elements
        self._owners: dict[int, Tensor] = {}  # the tensor that had it first
        self._new: set[int] = set()  # of tensors that the code makes: zeros, ones, ...

    def owner(self, tensor: Tensor) -> Tensor:
        """The tensor that this one is a part of."""
        return self._owners.get(_address(tensor), tensor)

    def note(self, tensor: Tensor, *, new: bool = False) -> None:
        """A tensor has appeared; a new one has a written-down size and no content of its own."""
        self._owners.setdefault(_address(tensor), tensor)
        if new:
            self._new.add(_address(tensor))

    def is_new(self, tensor: Tensor) -> bool:
        """Whether the code made it out of nothing."""
        return _address(tensor) in self._new

    def labels(self, tensor: Tensor) -> Maps | None:
        """Labels of a tensor whose memory was written into; None for any other."""
        written = self._written.get(_address(tensor)) if self._written else None
        return None if written is None else (compact(_seen_by(tensor, written[1])),)

    def part(self, target: Tensor, whole: Sequence[Tensor], maps: Maps) -> Tensor:
        """Labels of a part of a tensor, to be compared and overwritten.

        Args:
            target: The part.
            whole: Maps of the tensor that it is a part of.
            maps: What will be written. Of a new tensor, only the dimensions that these change along get a meaning.
        """
        if _address(target) not in self._written:
            owner, along = self.owner(target), {d for m in maps for d in varies(m)}
            memory = torch.zeros(target.untyped_storage().nbytes() // target.element_size(), dtype=torch.int64)
            for m in whole:
                if not self.is_new(target) or (target.dim() == owner.dim() and set(varies(m)) <= along):
                    _seen_by(owner, memory).copy_(m)
            self._written[_address(target)] = owner, memory
        return _seen_by(target, self._written[_address(target)][1])


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _seen_by(tensor: Tensor, memory: Tensor) -> Tensor:
    return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
