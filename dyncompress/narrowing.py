"""Cut channels out of a network, in place: parameters keep their identity, modules learn their new widths.

An *axis* (one dimension of one tensor) is described by *runs*: ``(group, start, count, repeat)`` stands for
``count`` consecutive channels of a width group from ``start`` on, each occupying ``repeat`` consecutive positions.
Group -1 is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Run = tuple[int, int, int, int]
Runs = tuple[Run, ...]
Kept = Sequence[Sequence[int]]
"""Kept channels of every width group, ascending."""


def encode(groups: Sequence[int], indices: Sequence[int]) -> Runs:
    """Runs of an axis whose position ``p`` holds channel ``indices[p]`` of group ``groups[p]``."""
    runs: list[list[int]] = []
    p, size = 0, len(groups)
    while p < size:
        g, i = groups[p], indices[p]
        q = p + 1
        while q < size and groups[q] == g and indices[q] == i and g >= 0:
            q += 1
        repeat = q - p
        start = -1 if g < 0 else i
        last = runs[-1] if runs else None
        if last and last[0] == g and (g < 0 or (last[3] == repeat and last[1] + last[2] == i)):
            last[2] += 1
        else:
            runs.append([g, max(start, 0), 1, repeat if g >= 0 else 1])
        p = q if g >= 0 else p + 1
    return tuple((a, b, c, d) for a, b, c, d in runs)


def length(runs: Runs) -> int:
    """Positions of an axis before the cut."""
    return sum(count * repeat for _, _, count, repeat in runs)


def positions(runs: Runs, kept: Kept) -> list[int]:
    """Positions of an axis that stay."""
    stay: list[int] = []
    at = 0
    for group, start, count, repeat in runs:
        if group < 0:
            stay += range(at, at + count)
        else:
            stay += [
                at + (c - start) * repeat + r for c in kept[group] if start <= c < start + count for r in range(repeat)
            ]
        at += count * repeat
    return stay


class Axes(Protocol):
    """What `cut` needs to know of a channel graph."""

    @property
    def axes(self) -> Mapping[str, Runs]: ...  # noqa: D102
    @property
    def seams(self) -> Mapping[str, tuple[Runs, Runs]]: ...  # noqa: D102
    @property
    def counts(self) -> Mapping[str, Runs]: ...  # noqa: D102


def cut(net: nn.Module, graph: Axes, kept: Kept) -> None:
    """Cut every axis down to the kept channels, re-index the seams, and bring counts in line.

    Args:
        net: The network, changed in place.
        graph: Its axes ``"<tensor>:<dim>"``, seams ``"<module>"`` and counts ``"<module>:<attribute>[:<index>]"``.
        kept: Channels of every width group that stay.
    """
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    changed: set[int] = set()
    with torch.no_grad():
        for key, runs in graph.axes.items():
            name, dim = key.rsplit(":", 1)
            stay = positions(runs, kept)
            tensor = tensors[name]
            if len(stay) == tensor.shape[int(dim)]:
                continue
            index = torch.tensor(stay, device=tensor.device)
            tensor.data = tensor.data.index_select(int(dim), index)
            tensor.grad = None
            changed.add(id(tensor))
    for module in net.modules():  # all of them: several may hold one tensor
        if any(id(t) in changed for t in [*module.parameters(False), *module.buffers(False)]):
            _learn_widths(module)
    for key, runs in graph.counts.items():
        path, attribute, *at = key.split(":")
        _set_count(net.get_submodule(path), attribute, [int(i) for i in at], len(positions(runs, kept)))
    for name, (entering, leaving) in graph.seams.items():
        into, out = positions(entering, kept), positions(leaving, kept)
        if len(into) == length(entering) and len(out) == length(leaving):
            continue
        parent, _, child = name.rpartition(".")
        inner = net.get_submodule(name)
        setattr(net.get_submodule(parent), child, Reindex(inner, length(entering), into, out))


def _set_count(module: nn.Module, attribute: str, index: list[int], count: int) -> None:
    if not index:
        setattr(module, attribute, count)
        return
    values = list(getattr(module, attribute))
    values[index[0]] = count
    setattr(module, attribute, type(getattr(module, attribute))(values))


def _learn_widths(module: nn.Module) -> None:
    """Bring the counts of torch's own modules in line with their tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        if module.transposed:
            if module.groups == module.in_channels > 1:
                module.groups = first
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            if module.groups == module.in_channels > 1:
                module.groups = first * module.groups // module.out_channels
            module.in_channels, module.out_channels = second * module.groups, first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    elif isinstance(getattr(module, "normalized_shape", None), tuple) and isinstance(module.weight, Tensor):
        module.normalized_shape = tuple(module.weight.shape)  # type: ignore[assignment]
    else:
        size = next((t.shape[0] for t in [*module.parameters(False), *module.buffers(False)] if t.dim() == 1), None)
        for count in ("num_features", "num_channels", "num_parameters"):
            if size is not None and isinstance(getattr(module, count, None), int):
                setattr(module, count, size)


class Reindex(nn.Module):
    """Runs a parameter-free module, whose code counts the original channels, inside a cut network.

    The kept channels are put back to their original places (zeros where channels were cut), the module runs as
    it was written, and the channels that the cut network keeps are taken from its result.

    Args:
        inner: The module.
        channels: Channels that enter it in the original network.
        entering: Those of them that the cut network keeps.
        leaving: Kept channels of its result.
    """

    def __init__(self, inner: nn.Module, channels: int, entering: Sequence[int], leaving: Sequence[int]) -> None:
        super().__init__()
        self.inner = inner
        source = torch.full((channels,), len(entering))
        source[list(entering)] = torch.arange(len(entering))
        # plain attributes: as buffers they would be averaged, and so corrupted, by EMA callbacks
        self.source, self.leaving = source, torch.tensor(list(leaving))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.source, self.leaving = fn(self.source), fn(self.leaving)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, kept, ...) -> (B, kept, ...)."""
        with_zero = F.pad(x, [0, 0] * (x.dim() - 2) + [0, 1])
        out: Tensor = self.inner(with_zero.index_select(1, self.source))
        return out.index_select(1, self.leaving)
