"""The networks that are timed, and what each is compared with. Needs the libraries of the zoo on the path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

import benchmarks.operators  # noqa: F401 - before anything imports torchvision
import dyncompress as dc
from benchmarks.networks import enliven
from dyncompress.conversion import narrowed
from dyncompress.cost import measure_macs

NETWORKS = {"ResNet-18": "resnet18", "ResNet-50": "resnet50", "MobileNetV2": "mobilenetv2_100", "CIFAR ResNet-20": ""}
"""Names of timm; the last is the recipe's own."""
TARGET = "33%"
METHOD = "dynet"  # of all rows in results/speed, whatever the default is
BUDGETS = {**dict.fromkeys(NETWORKS, (TARGET,)), "MobileNetV2": (TARGET, "15%")}


def build(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A network in eval mode with BatchNorm statistics of what it saw, and one image for it."""
    torch.manual_seed(seed)
    if NETWORKS[name]:
        import timm

        net, size = timm.create_model(NETWORKS[name]), 224
    else:
        from cifar10 import ResNet

        net, size = ResNet(20), 32
    image = torch.randn(1, 3, size, size)
    enliven(net, torch.randn(4, 3, size, size))
    return net.eval(), image


def as_converted(net: nn.Module, image: Tensor) -> nn.Module:
    """The network itself as a student, so that it can be folded and exported as students are."""
    return dc.convert(net, dc.make_plan(net, image, target=1.0, method="static"))


@dataclass(frozen=True)
class Subject:
    """A network, its student at `TARGET` of the MACs, and the static network of the student's widths."""

    name: str
    original: nn.Module
    image: Tensor
    plan: dc.Plan
    dynamic: nn.Module

    @classmethod
    def of(cls, name: str, seed: int, target: str = TARGET) -> Subject:
        """By its name in `NETWORKS`."""
        net, image = build(name, seed)
        plan = dc.make_plan(net, image, target, METHOD)
        label = name if target == TARGET else f"{name} at {target.replace('%', ' %')}"
        return cls(label, net, image, plan, dc.convert(net, plan))

    @classmethod
    def all(cls, seed: int) -> Iterator[Subject]:
        """Every network, at every budget that it is timed at."""
        for name, targets in BUDGETS.items():
            yield from (cls.of(name, seed, target) for target in targets)

    @cached_property
    def static(self) -> nn.Module:
        """What the student computes before it is trained, with one kernel per channel."""
        return narrowed(self.original, self.plan)

    @property
    def arms(self) -> dict[str, nn.Module]:
        """The three, by name."""
        return {"original": self.original, "static": self.static, "dynamic": self.dynamic}

    @property
    def folded(self) -> dict[str, nn.Module]:
        """The three as they are deployed: BatchNorm folded."""
        return {
            "original": dc.fold(as_converted(self.original, self.image)),
            "static": dc.fold(as_converted(self.static, self.image)),
            "dynamic": dc.fold(self.dynamic),
        }

    def batch(self, size: int, seed: int = 1) -> Tensor:
        """Images of the network's size."""
        return torch.randn(size, *self.image.shape[1:], generator=torch.Generator().manual_seed(seed))

    def macs(self, arms: dict[str, nn.Module]) -> dict[str, float]:
        """MACs by arm, as fractions of the original's."""
        original = measure_macs(self.original, self.image)
        return {name: measure_macs(net, self.image) / original for name, net in arms.items()}
