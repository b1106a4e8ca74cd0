"""What a network costs: multiply-adds (MACs) and parameters, of a module that exists or of one that is planned.

One multiply-add counts as 1 MAC; papers and ptflops call that a FLOP. A dynamic convolution costs its convolution,
the assembly of its kernels and its share of the router, for one image at batch 1. Only convolutions and matrix
products count (as in torch's `FlopCounterMode`, which gives twice these numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dyncompress.graph import ConvGraph, Extent, Operation, as_call, bare, duplicate, extent, one_image, undisturbed
from dyncompress.layers import ConvSite, ConvSpec, Macs, Method


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of scaled dot product attention, two per MAC, from the shapes of its operands."""
    return int(sdpa_flop_count(query, key, value))


# torch counts attention on other devices
_UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def measure_macs(net: nn.Module, example: Any) -> int:
    """MACs of one forward pass on one image, counted by torch while a copy of the network runs.

    Args:
        net: Any network; left as it was.
        example: What its ``forward`` takes; a batch is cut to its first image.

    Returns:
        Multiply-adds of every convolution and matrix product.
    """
    args, kwargs = as_call(one_image(example))
    copy = duplicate(bare(net), share=True).eval()
    for p in copy.parameters():
        if p.is_leaf:
            p.requires_grad_(False)  # the counter hooks what asks for gradients
    with undisturbed(), FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        copy(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def count_params(net: nn.Module) -> int:
    """Number of parameters; a tensor that is used twice counts once."""
    return sum(p.numel() for p in net.parameters())


@dataclass(frozen=True)
class Choice:
    """What becomes of one convolution."""

    name: str
    method: Method
    share: str = ""  # layers with the same share (and method) are built together; "" stands alone
    reason: str = ""  # why it isn't simply the plan's method


class _Cost(NamedTuple):
    """Of layers that are built together."""

    macs: int
    params: int
    layers: dict[str, tuple[Macs, int]]


class CostModel:
    """Cost of a network as a function of its widths: integer arithmetic, no module is built.

    Args:
        graph: Its channel graph.
        choices: What becomes of each of ``graph.convs``, in that order.
    """

    def __init__(self, graph: ConvGraph, choices: Sequence[Choice]) -> None:
        self.graph = graph
        self.choices = {c.name: c for c in choices}
        sets: dict[Any, list[Operation]] = {}
        for op, choice in zip(graph.convs, choices, strict=True):
            key = (choice.share, choice.method) if choice.share else op.module
            sets.setdefault(key, []).append(op)
        self.sets = list(sets.values())
        # A search asks for thousands of costs and moves one group at a time: what a set costs is kept by the widths
        # that it depends on.
        self._widths = [_widths_of(graph, members) for members in self.sets]
        self._known: list[dict[Any, _Cost]] = [{} for _ in self.sets]
        replaced = {f"{op.module}.{kind}" for op in graph.convs for kind in ("weight", "bias")}  # by a method's layer,
        self._parameters = [  # whose own formula counts them
            (math.prod(s for d, s in enumerate(shape) if f"{name}:{d}" not in graph.axes), extents)
            for name, shape in graph.parameters.items()
            if name not in replaced
            for extents in [[_extent(graph, f"{name}:{d}") for d in range(len(shape)) if f"{name}:{d}" in graph.axes]]
        ]

    def site(self, op: Operation, keep: Sequence[int]) -> ConvSite:
        """A convolution at the widths of a plan."""
        assert op.spec is not None
        return ConvSite(op.module, narrow_spec(self.graph, op, keep), op.positions)

    def out_widths(self, keep: Sequence[int]) -> list[int]:
        """Output channels of every replaceable convolution."""
        return [narrow_spec(self.graph, op, keep).out_channels for op in self.graph.convs]

    def layers(self, keep: Sequence[int]) -> dict[str, tuple[Macs, int]]:
        """MACs and parameters of every replaceable convolution, by name."""
        return {name: cost for each in self._costs(keep) for name, cost in each.layers.items()}

    def _costs(self, keep: Sequence[int]) -> Iterator[_Cost]:
        for members, widths_of, known in zip(self.sets, self._widths, self._known, strict=True):
            key = widths_of(keep)
            if key not in known:
                known[key] = self._cost(members, keep)
            yield known[key]

    def _cost(self, members: Sequence[Operation], keep: Sequence[int]) -> _Cost:
        sites = [self.site(op, keep) for op in members]
        method = self.choices[members[0].module].method
        params = method.params(sites)
        if len(members) > 1:
            macs = [m * op.runs[0][1] for m, op in zip(method.macs(sites), members, strict=True)]
        else:
            calls = members[0].runs
            macs = [sum((method.macs([replace(sites[0], positions=p)])[0] * n for p, n in calls), Macs(0))]
        layers = {op.module: cost for op, cost in zip(members, zip(macs, params, strict=True), strict=True)}
        return _Cost(sum(m.total for m in macs), sum(params), layers)

    def macs(self, keep: Sequence[int]) -> int:
        """MACs of the whole network for one image, with ``keep[g]`` channels in group ``g``."""
        rest = sum(operation_macs(op, keep) for op in self.graph.operations if op.spec is None)
        return rest + sum(each.macs for each in self._costs(keep))

    def params(self, keep: Sequence[int]) -> int:
        """Parameters of the whole network."""
        rest = sum(n * math.prod(_size(e, keep) for e in extents) for n, extents in self._parameters)
        return rest + sum(each.params for each in self._costs(keep))


def operation_macs(op: Operation, keep: Sequence[int]) -> int:
    """MACs of an operation as it stands in the network (a convolution: static)."""
    return op.fixed * math.prod(_size(e, keep) for e in op.axes)


def narrow_spec(graph: ConvGraph, op: Operation, keep: Sequence[int]) -> ConvSpec:
    """Shape of a convolution at the widths of a plan."""
    assert op.spec is not None
    out = _size(_extent(graph, f"{op.weight}:0"), keep) or op.spec.out_channels
    per_group = _size(_extent(graph, f"{op.weight}:1"), keep) or op.spec.in_channels // op.spec.groups
    groups = op.spec.groups
    if groups == op.spec.in_channels and groups > 1:
        groups = out * groups // op.spec.out_channels
    return replace(op.spec, in_channels=per_group * groups, out_channels=out, groups=groups)


def _widths_of(graph: ConvGraph, members: Sequence[Operation]) -> Callable[[Sequence[int]], Any]:
    """Picks the widths that decide the shapes of some convolutions."""
    extents = [_extent(graph, f"{op.weight}:{axis}") for op in members for axis in (0, 1)]
    groups = sorted({group for _, parts in extents for group, _ in parts})
    return itemgetter(*groups) if groups else lambda keep: ()


def _extent(graph: ConvGraph, key: str) -> Extent:
    runs = graph.axes.get(key)
    return extent(runs) if runs is not None else (0, ())


def _size(size: Extent, keep: Sequence[int]) -> int:
    fixed, parts = size
    return fixed + sum(keep[group] * each for group, each in parts)


def widths(graph: ConvGraph) -> list[int]:
    """Channels of every width group before anything is cut."""
    return [group.channels for group in graph.groups]


def static_choices(graph: ConvGraph, static: Method) -> list[Choice]:
    """Every convolution stays static: the cost model of the network as it is, or merely narrowed."""
    return [Choice(op.module, static) for op in graph.convs]


def fits(graph: ConvGraph, parameters: Mapping[str, tuple[int, ...]]) -> str:
    """The first difference between a graph's parameters and a network's; '' where there is none."""
    for name, shape in graph.parameters.items():
        if name not in parameters:
            return f"the network has no parameter '{name}'"
        if tuple(parameters[name]) != tuple(shape):
            return f"'{name}' has shape {tuple(parameters[name])}, the plan expects {tuple(shape)}"
    extra = next((name for name in parameters if name not in graph.parameters), "")
    return f"the plan knows no parameter '{extra}'" if extra else ""
