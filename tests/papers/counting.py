"""What papers count: the networks of their tables, and the conventions in which they count multiply-adds."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from dyncompress.cost import CostModel, static_choices, widths
from dyncompress.graph import ConvGraph, Operation
from dyncompress.layers import Macs, Static
from dyncompress.plan import Plan
from dyncompress.planning import Problem
from dyncompress.presets import find_preset
from dyncompress.tracing import Tracer
from papers.mobiles import MobileNetV2, MobileNetV3, ShuffleNetV2
from papers.resnets import ConvNeXt, resnet

IMAGE = torch.zeros(1, 3, 224, 224)
NETWORKS = {
    "ResNet-10": lambda: resnet(10),
    "ResNet-18": lambda: resnet(18),
    "ResNet-18, projected": lambda: resnet(18, project=True),
    "ResNet-50": lambda: resnet(50),
    "ResNet-50, early": lambda: resnet(50, early=True),
    "ResNet-101": lambda: resnet(101),
    "ResNet-101, early": lambda: resnet(101, early=True),
    "MobileNetV2": MobileNetV2,
    "MobileNetV2 0.75": lambda: MobileNetV2(0.75),
    "MobileNetV2 0.5": lambda: MobileNetV2(0.5),
    "MobileNetV3-Small": lambda: MobileNetV3(large=False),
    "MobileNetV3-Large": lambda: MobileNetV3(large=True),
    "ShuffleNetV2": ShuffleNetV2,
    "ConvNeXt-T": ConvNeXt,
}


# The first 1x1 of a bottleneck has the stride in ODConv's baselines (3.858 G of ResNet-50), as in He et al.; which of
# the two DyNet has is not said (3.89 G). Its Dy-ResNet18 keeps 64 channels in the stem, which takes a projection.
_EARLY = {"ResNet-50": "ResNet-50, early", "ResNet-101": "ResNet-101, early"}
AS_IN_THE_PAPER = {
    "odconv": _EARLY,
    "dynet": {**_EARLY, "ResNet-18": "ResNet-18, projected"},
    "dyconv": {},
    "dcd": {},
}


@cache
def network(name: str) -> nn.Module:
    return NETWORKS[name]()


@cache
def graph(name: str, linear: bool = False) -> ConvGraph:
    """Channel graph at 224x224: traced at 64x64, in a quarter of the time, and told of 3.5 times larger maps."""
    found = Tracer(network(name), IMAGE[:, :, :64, :64], linear=linear).graph
    return replace(found, operations=tuple(map(_enlarged, found.operations)))


def _enlarged(op: Operation) -> Operation:
    if op.positions == 1 or not (op.spec is not None or op.kind.startswith("conv")):
        return op
    runs = tuple((positions * 49 // 4, images) for positions, images in op.runs)
    return replace(op, positions=op.positions * 49 // 4, fixed=op.fixed * 49 // 4, runs=runs)


@cache
def plan(preset: str, name: str) -> Plan:
    """What ``make_plan(network, image, preset=...)`` gives, of a network that is traced once for all presets."""
    found = find_preset(preset)
    method = found.configured(None, None)
    traced = graph(name, getattr(method, "linear", False))
    problem = Problem(network(name), traced, method, preset=(found, {}))
    return problem.as_published(found)


def convolutions(plan: Plan) -> float:
    """Millions of multiply-adds of convolutions and classifier, as DyNet's tables count: neither mixing nor routers."""
    return (plan.macs_after - sum(macs.kernels + macs.router for macs in _layers(plan))) / 1e6


def everything(plan: Plan) -> float:
    """Millions of multiply-adds as this package counts: convolutions, mixing and routers."""
    return plan.macs_after / 1e6


def operations(plan: Plan) -> float:
    """Millions of operations as ODConv's code does them, beside convolutions and routers.

    A kernel is multiplied and added, weight by weight; every input and, but for depthwise layers, every output is
    multiplied with the attention to its channel.
    """
    total = plan.macs_after
    dynamic = {choice.name for choice in plan.choices if choice.method.name == "odconv"}
    for op in plan.graph.convs:
        if op.module in dynamic and (spec := op.spec) is not None:
            total += plan.costs.layers(plan.widths)[op.module][0].kernels
            total += spec.in_channels * op.positions * math.prod(spec.stride)
            total += 0 if spec.is_depthwise else spec.out_channels * op.positions
    return total / 1e6


def params(plan: Plan) -> float:
    """Parameters in millions."""
    return plan.params_after / 1e6


def static(name: str) -> tuple[float, float]:
    """Parameters and multiply-adds of a network as it is, in millions."""
    model = CostModel(graph(name), static_choices(graph(name), Static()))
    return model.params(widths(graph(name))) / 1e6, model.macs(widths(graph(name))) / 1e6


def _layers(plan: Plan) -> list[Macs]:
    return [macs for macs, _ in plan.costs.layers(plan.widths).values()]
