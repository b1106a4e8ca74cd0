"""Places where the code counts channels: a split, a slice, a view whose sizes are written down.

Such code follows a cut in one of a few ways. The number may live in an attribute of the module, which is then
brought up to date; or it was computed from a shape, and then the pieces must be cut alike. Nobody can tell from
outside, so a place lists its ways, the freest first. The first one that survives verification is taken; where none
does, its channels are pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Attribute:
    """An integer of a module, or an element of its tuple or list of integers."""

    module: str
    name: str
    index: int | None = None

    @property
    def key(self) -> str:
        """``module:name`` or ``module:name:index``."""
        return f"{self.module}:{self.name}" + ("" if self.index is None else f":{self.index}")


@dataclass(frozen=True, eq=False)
class Count:
    """An attribute that holds how many channels there are: it follows the cut of these labels."""

    attribute: Attribute
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Way:
    """One way to cut the channels that pass a place."""

    ties: tuple[Pair, ...] = ()
    counts: tuple[Count, ...] = ()


Line = tuple[str, str, int]
"""Class of a module, op, turn: the same for every block that runs the same code."""


@dataclass(frozen=True, eq=False)
class Site:
    """A place in the code, and the way that is taken there; after the last one its channels are pinned."""

    module: str
    line: Line
    labels: Tensor
    ways: tuple[Way, ...]
    taken: int

    @property
    def way(self) -> Way | None:
        """The way that is taken; None where there is none left."""
        return self.ways[self.taken] if self.taken < len(self.ways) else None

    @property
    def others(self) -> range:
        """Ways that come after the one that is taken; the last one stands for none: the channels are pinned."""
        return range(self.taken + 1, len(self.ways) + 1)

    @property
    def unpatched(self) -> int:
        """The first way that leaves attributes as they are."""
        return next((i for i, way in enumerate(self.ways) if not way.counts), len(self.ways))


def holders(module: nn.Module, path: str, number: int) -> list[Attribute]:
    """Attributes of a module that hold a number."""
    if number < 2:
        return []
    found = []
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool) and value == number:
            found.append(Attribute(path, name))
        elif isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
            found += [Attribute(path, name, i) for i, v in enumerate(value) if v == number]
    return found


def _near_holders(module: nn.Module, path: str, number: int) -> list[Attribute]:
    """Attributes of the running module, else of its children: a method of theirs may be running."""
    own = holders(module, path, number)
    prefix = f"{path}." if path else ""
    return own or [a for name, m in module.named_children() for a in holders(m, prefix + name, number) if not _known(m)]


def _known(module: nn.Module) -> bool:
    """Torch's own modules learn their widths from their tensors."""
    return type(module).__module__.startswith("torch.nn.")


def counted(module: nn.Module, path: str, numbers: Sequence[tuple[int, Tensor]]) -> list[tuple[Count, ...]]:
    """Sets of attributes that may hold the numbers: all that do first, then one per number, then none.

    A list that holds the whole sequence, in order, is the clearest case and goes first.
    """
    sizes = [n for n, _ in numbers]
    for name, value in vars(module).items():
        if len(sizes) > 1 and isinstance(value, (tuple, list)) and list(value) == sizes:
            return [tuple(Count(Attribute(path, name, i), ids) for i, (_, ids) in enumerate(numbers))]
    held = [[Count(a, ids) for a in _near_holders(module, path, n)] for n, ids in numbers]
    every = tuple(c for counts in held for c in counts)
    if not every:
        return []
    first = tuple(counts[0] for counts in held if counts)
    last = tuple(counts[-1] for counts in held if counts)
    found = [every]
    for choice in (first, last):
        if choice not in found:
            found.append(choice)
    return found


def alike(rows: Tensor, boundaries: Sequence[int]) -> tuple[Pair, ...]:
    """Ties that keep a split at ``boundaries`` in proportion: the same positions go in every unit of it.

    Args:
        rows: Labels ``[..., C]`` of the channels that are split.
        boundaries: Where.

    Returns:
        The ties; none where the boundaries have no unit in common.

    Example:
        >>> import torch
        >>> [(a.tolist(), b.tolist()) for a, b in alike(torch.arange(1, 7), [4])]
        [([[1, 2], [3, 4], [5, 6]], [[1, 2]])]
    """
    unit = gcd(rows.shape[-1], *boundaries)
    if unit < 2:
        return ()
    units = rows.unflatten(-1, (-1, unit))
    return ((units, units.narrow(-2, 0, 1)),)
