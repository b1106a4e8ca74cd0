"""What a student will take, before there is one: measured layers added up, and what lies between them.

    time(plan) = sum of the table's entries + rest,   rest = r0 + r1 * activations

The rest (activation functions, additions, pooling, linear layers, Python) is what the sum lacks of the time of two real
networks, the original and a static one of half its widths; activations are the elements that convolutions write, and
what other products of the network cost. All of it is in the unit of the table, the time of its reference, and of
networks whose BatchNorms are folded: so they are shipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from dyncompress.conversion import convert
from dyncompress.cost import CostModel, operation_macs, static_choices, widths
from dyncompress.folding import fold
from dyncompress.graph import ConvGraph, Operation, as_call, duplicate, one_image, undisturbed
from dyncompress.latency import evaluating, resize_batch, run
from dyncompress.latencytable import LatencyTable, Layers, Run
from dyncompress.layers import Method, Static
from dyncompress.plan import Plan

_MACS_PER_ELEMENT = 16
"""Multiply-adds of a matrix product that take about as long as one element of an activation function."""


def shipped(net: nn.Module, plan: Plan) -> nn.Module:
    """The student of a plan as it is deployed: converted, its BatchNorms folded."""
    return fold(convert(net, plan))


def unchanged(graph: ConvGraph) -> Plan:
    """The plan of the original: everything keeps its width and stays static."""
    return static_plan(graph, widths(graph))


def static_plan(graph: ConvGraph, keep: Sequence[int]) -> Plan:
    """A plan of given widths without anything dynamic."""
    return Plan(graph, tuple(keep), tuple(static_choices(graph, Static())), "static", {}, "100%", "uniform")


def sizes(net: nn.Module, graph: ConvGraph, example: Any) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """Images and spatial size of what every replaceable convolution reads, one entry per call, for one image."""
    found: dict[str, list[tuple[int, tuple[int, ...]]]] = {op.module: [] for op in graph.convs}
    copy = duplicate(net, share=True)

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shape = args[0].shape
            size = (math.prod(shape[1:-1]),) if isinstance(module, nn.Linear) else tuple(shape[2:])
            found[name].append((shape[0], size))

        return seen

    for name in found:
        copy.get_submodule(name).register_forward_pre_hook(note(name))
    args, kwargs = as_call(one_image(example))
    with evaluating(copy), undisturbed():
        copy(*args, **kwargs)
    return found


@dataclass(frozen=True)
class Rest:
    """Time beside the convolutions, in units of the table's reference: ``r0 + r1 * activations``."""

    r0: float
    r1: float

    def time(self, activations: float) -> float:
        """The time."""
        return self.r0 + self.r1 * activations

    @classmethod
    def through(cls, wide: tuple[float, float], narrow: tuple[float, float]) -> Rest:
        """The line through two points (activations, time); constant where both have the same activations.

        Example:
            >>> Rest.through((30.0, 5.0), (10.0, 3.0))
            Rest(r0=2.0, r1=0.1)
        """
        (a, t), (b, u) = wide, narrow
        r1 = (t - u) / (a - b) if a != b else 0.0
        return cls(t - r1 * a, r1)


class Prediction:
    """Predicts the time of any student of a network from the entries of a table.

    Args:
        net: The network.
        example: What its ``forward`` takes.
        graph: Its channel graph.
        table: The table; what it lacks is measured, on the first question.

    Attributes:
        half: The plan of the static network that is measured beside the original.
    """

    def __init__(self, net: nn.Module, example: Any, graph: ConvGraph, table: LatencyTable) -> None:
        self.net, self.graph, self.table = net, graph, table
        self.half = static_plan(graph, [max(1, c // 2) for c in widths(graph)])
        self._inputs = resize_batch(example, table.device.batch)
        self._sizes = sizes(net, graph, example)

    @cached_property
    def _measured(self) -> tuple[float, float]:
        """Times of the original and of the half, which take turns: what slows the machine meanwhile slows both."""
        nets = [shipped(self.net, plan) for plan in (unchanged(self.graph), self.half)]
        wide, narrow = self.table.measure(
            [lambda whole=each: run(whole, self._inputs) for each in nets]  # type: ignore[misc]
        ).ratios
        return wide, narrow

    @property
    def original(self) -> float:
        """Time of the original, in units of the table's reference."""
        return self._measured[0]

    @cached_property
    def rest(self) -> Rest:
        """What the network takes beside its convolutions: two networks tell."""
        points = [
            (self.activations(plan.widths), time - self.layers(plan.costs, plan.widths))
            for plan, time in zip((unchanged(self.graph), self.half), self._measured, strict=True)
        ]
        return Rest.through(*points)

    def activations(self, keep: Sequence[int]) -> float:
        """Elements that the convolutions write for one image, and a share of the MACs of other products."""
        model = CostModel(self.graph, static_choices(self.graph, Static()))
        written = sum(
            model.site(op, keep).spec.out_channels * sum(positions * images for positions, images in op.runs)
            for op in self.graph.convs
        )
        others = sum(operation_macs(op, keep) for op in self.graph.operations if op.spec is None)
        return written + others / _MACS_PER_ELEMENT

    def entries(self, model: CostModel, keep: Sequence[int]) -> list[Layers]:
        """The table's entries that a student consists of, in the order in which they run."""
        found: list[Layers] = []
        for members in model.sets:
            found += self.entries_of(model.choices[members[0].module].method, members, model, keep)
        return found

    def entries_of(
        self, method: Method, members: Sequence[Operation], model: CostModel, keep: Sequence[int]
    ) -> list[Layers]:
        """The entries of some convolutions under a method: one where it builds them together, else one per call."""
        runs = [self._runs(op, model, keep) for op in members]
        if len(members) > 1 and method.sharing != "layer":
            return [Layers(method, tuple(calls[0] for calls in runs))]
        return [Layers(method, (call,)) for calls in runs for call in calls]

    def _runs(self, op: Operation, model: CostModel, keep: Sequence[int]) -> list[Run]:
        spec = model.site(op, keep).spec
        spec = replace(spec, bias=spec.bias or bool(op.norm))  # where the shift of its BatchNorm goes
        return [Run(spec, size, images) for images, size in self._sizes[op.module]]

    def layers(self, model: CostModel, keep: Sequence[int]) -> float:
        """Time of the convolutions, in units of the table's reference."""
        return sum(self.table.times(self.entries(model, keep)))

    def time(self, model: CostModel, keep: Sequence[int]) -> float:
        """Time of a student, in units of the table's reference."""
        return self.layers(model, keep) + self.rest.time(self.activations(keep))

    def ratio(self, plan: Plan) -> float:
        """Time of a plan's student as a multiple of the original's."""
        return self.time(plan.costs, plan.widths) / self.original

    def seconds(self, plan: Plan) -> float:
        """Time of a plan's student, at the speed that the machine had when the table was last measured."""
        return self.time(plan.costs, plan.widths) * self.table.reference
