"""A training step of whole networks: forward, cross-entropy, backward, SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed import modes
from benchmarks.speed.request import Request
from benchmarks.speed.rows import Row
from benchmarks.speed.subjects import Subject

NETWORKS = ("ResNet-18", "MobileNetV2", "CIFAR ResNet-20")
BATCH = 32
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


def labels_for(size: int, device: str) -> Tensor:
    """Classes that all networks here know."""
    return (torch.arange(size) % 10).to(device)


def measure(request: Request) -> Iterator[Row]:
    """A step of every network, in every mode but CUDA graphs."""
    y = labels_for(BATCH, request.device)
    backward: Callable[[Tensor], None] = lambda logits: F.cross_entropy(logits.float(), y).backward()  # noqa: E731
    for name in NETWORKS:
        subject = Subject.of(name, request.seed)
        x = subject.batch(BATCH).to(request.device)
        macs = subject.macs(subject.arms)
        for mode in request.ways:
            if "graphed" in modes.words(mode):
                continue  # an optimizer has to be written for it
            with modes.conditions(mode):
                arms = {arm: modes.training(net, x, mode, backward, SGD) for arm, net in subject.arms.items()}
                race = request.effort.race(arms)
            common = {"subject": name, "setting": "training step", "mode": mode, "batch": BATCH}
            yield from race.rows(["static", "dynamic"], macs=macs, **common)
