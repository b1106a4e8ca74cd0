"""What each convolution is for: told from shapes, from the order in which they run and from residual blocks.

No name is read, so that one network is the same whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dyncompress.graph import ConvGraph, Operation, extent
from dyncompress.layers import ConvSpec

__all__ = ["Inverted", "inverted", "reads", "roles", "writes"]


@dataclass(frozen=True)
class Inverted:
    """A depthwise convolution between two pointwise ones; the first, where there is one, reads another width."""

    expand: Operation | None
    depthwise: Operation
    project: Operation

    @property
    def members(self) -> tuple[Operation, ...]:
        """Its convolutions, in the order in which they run."""
        return (self.depthwise, self.project) if self.expand is None else (self.expand, self.depthwise, self.project)


def roles(graph: ConvGraph) -> dict[str, str]:
    """The role of every layer that a method can replace, by the name of its module.

    * ``stem``: the first convolution.
    * ``expand``, ``depthwise``, ``project``: of an inverted bottleneck, in this order.
    * ``separable``: a depthwise convolution without one that expands, and the pointwise one after it.
    * ``shortcut``: the pointwise one beside a residual block; ``block``: any other one inside.
    * ``gate``: runs on one position, as in squeeze and excitation.
    * ``last``: the pointwise one that runs last.
    * ``classifier``: the linear layer that runs last; ``linear``: any other one.
    * ``other``: the rest.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from dyncompress.tracing import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1))
        >>> roles(trace(net, torch.zeros(1, 3, 8, 8)))
        {'0': 'stem', '1': 'separable', '2': 'separable'}
    """
    found = {op.module: "linear" for op in graph.convs if op.kind == "linear"}
    if found and graph.convs[-1].module in found:
        found[graph.convs[-1].module] = "classifier"
    convs = [op for op in graph.convs if op.module not in found]
    found |= {op.module: "gate" for op in convs if op.positions == 1}
    found[graph.anchor] = "stem"
    for chain in inverted(graph):
        named = ("expand", "depthwise", "project") if chain.expand is not None else ("separable", "separable")
        for op, role in zip(chain.members, named, strict=True):
            found.setdefault(op.module, role)
    for block in dict.fromkeys(op.block for op in convs if op.block):
        inside = [op for op in convs if op.block == block]
        for op in inside:
            found.setdefault(op.module, "shortcut" if _is_shortcut(graph, op, inside) else "block")
    if convs and convs[-1].spec is not None and _pointwise(convs[-1].spec):
        found.setdefault(convs[-1].module, "last")
    for op in convs:
        found.setdefault(op.module, "depthwise" if _spec(op).is_depthwise else "other")
    return {op.module: found[op.module] for op in graph.convs}


def inverted(graph: ConvGraph) -> list[Inverted]:
    """Every depthwise convolution that a pointwise one follows, in the order in which they run."""
    convs = [op for op in graph.convs if op.kind != "linear" and (op.positions > 1 or op.module == graph.anchor)]
    chains: list[Inverted] = []
    for index, (op, after) in enumerate(pairwise(convs)):
        spec, width = _spec(op), _spec(op).out_channels
        if not spec.is_depthwise or not _pointwise(_spec(after)) or _spec(after).in_channels != width:
            continue
        before = convs[index - 1] if index else None
        expands = before is not None and _pointwise(_spec(before)) and _spec(before).out_channels == width
        taken = chains and before is not None and chains[-1].project.module == before.module
        chains.append(Inverted(before if expands and not taken else None, op, after))
    return chains


def writes(graph: ConvGraph, op: Operation) -> set[int]:
    """Width groups that a convolution writes."""
    return _groups(graph, f"{op.weight}:0")


def reads(graph: ConvGraph, op: Operation) -> set[int]:
    """Width groups that a convolution reads."""
    return _groups(graph, f"{op.weight}:1")


def _groups(graph: ConvGraph, axis: str) -> set[int]:
    return {group for group, _ in extent(graph.axes[axis])[1]} if axis in graph.axes else set()


def _is_shortcut(graph: ConvGraph, op: Operation, inside: Sequence[Operation]) -> bool:
    """Whether a pointwise convolution goes from where its block begins to where another of its convolutions ends."""
    spec, first = _spec(op), _spec(inside[0])
    if not _pointwise(spec) or spec.in_channels != first.in_channels or reads(graph, op) != reads(graph, inside[0]):
        return False
    return any(
        _spec(other).out_channels == spec.out_channels
        and writes(graph, other) == writes(graph, op)
        and reads(graph, other) != reads(graph, op)
        for other in inside
        if other is not op
    )


def _pointwise(spec: ConvSpec) -> bool:
    return max(spec.kernel_size) == 1 and spec.groups == 1


def _spec(op: Operation) -> ConvSpec:
    assert op.spec is not None
    return op.spec
