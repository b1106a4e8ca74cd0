"""What is compressed, how far, and how long each student trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.trainings import ROOT
from dyncompress.host import find_network
from dyncompress.recipe import build, importable, read_recipe


@dataclass(frozen=True)
class Network:
    """A recipe's network.

    Attributes:
        title: What the page calls it.
        recipe: Name of its YAML file.
        data: Which data set it reads: a folder per name is given on the command line.
        size: Channels, height and width of an image.
        score: What is compared.
        words: What is changed in the recipe.
        dense: Whether it answers for every pixel: a teacher's answers are too large to keep then, and batches of 32
            are not timed.
    """

    title: str
    recipe: str
    data: str = "cifar10"
    size: tuple[int, int, int] = (3, 32, 32)
    score: str = "accuracy"
    words: Mapping[str, Any] = field(default_factory=dict)
    dense: bool = False

    @property
    def path(self) -> Path:
        """The recipe."""
        return ROOT / "recipes" / self.recipe

    @property
    def example(self) -> Tensor:
        """One image."""
        return torch.zeros(1, *self.size)

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes to time."""
        return (1,) if self.dense else (1, 32)

    def untrained(self) -> nn.Module:
        """The network."""
        recipe = read_recipe([str(self.path), *(w for k, v in self.words.items() for w in (f"--{k}", str(v)))])
        with importable(recipe.folder):
            module = build(recipe.model, "model")
        return find_network(module, recipe.module)[1]


# The recipe has 0.1, to train from scratch. After two epochs at 25 % of the MACs 0.05 had the static student ahead by
# 0.9 points, and one with channel attention by 0.5 (`python -m benchmarks.screening`, one seed); the originals of these
# two have weights already.
_TUNED = {"model.lr": 0.05}

NETWORKS = {
    "resnet20": Network("CIFAR-10 ResNet-20", "cifar10_resnet20.yaml", words=_TUNED),
    "resnet56": Network("CIFAR-10 ResNet-56", "cifar10_resnet20.yaml", words={"model.depth": 56, **_TUNED}),
    "mobilenetv2": Network("CIFAR-10 MobileNetV2", "cifar10_mobilenetv2.yaml"),
    "camvid": Network("CamVid encoder-decoder", "camvid.yaml", "camvid", (3, 180, 240), "mIoU", dense=True),
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        network: Key of `NETWORKS`.
        budget: What each student may cost, as a recipe's target.
        seeds: One student each.
        epochs: Of fine-tuning.
    """

    network: str
    budget: str
    seeds: tuple[int, ...]
    epochs: int

    @property
    def timed(self) -> bool:
        """Whether the budget is in time: plans are measured then, on a quiet machine."""
        return "latency" in self.budget

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.network}-{self.budget.replace('%', '').replace(' ', '-')}-{self.epochs}"


def _cases(network: str, budgets: tuple[str, ...], seeds: tuple[int, ...], epochs: int) -> tuple[Case, ...]:
    return tuple(Case(network, budget, seeds, epochs) for budget in budgets)


_THREE = (0, 1, 2)
_SHARES = ("33%", "25%", "50%")
SAME_TIME = "75% latency"
TIERS = {
    "cpu": (
        *_cases("resnet20", ("33%", "25%"), _THREE, 4),
        *_cases("resnet20", ("50%",), (0,), 4),
        *_cases("resnet20", ("33%", "25%"), _THREE, 12),  # whether what dynamics gain grows with training
        *_cases("resnet20", ("50%",), (0,), 12),
        *_cases("resnet20", ("25%",), (0,), 30),  # ... and goes on growing
        *_cases("resnet20", (SAME_TIME,), _THREE, 4),
        *_cases("camvid", ("50%", "50% latency"), _THREE, 10),
    ),
    "gpu": (
        *(
            c
            for name in ("resnet20", "resnet56", "mobilenetv2")
            for c in _cases(name, (*_SHARES, SAME_TIME), _THREE, 60)
        ),
        *_cases("camvid", (*_SHARES, SAME_TIME), _THREE, 60),
    ),
}


def as_json(seeds: tuple[int, ...]) -> str:
    """Seeds as a recipe's command line takes them."""
    return json.dumps(list(seeds))
