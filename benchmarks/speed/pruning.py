"""torch-pruning beside us: the same network pruned to the same MACs, BatchNorm folded in all arms, batch 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import dyncompress as dc
from benchmarks.peer import search
from benchmarks.speed import modes
from benchmarks.speed.request import Request
from benchmarks.speed.rows import Row
from benchmarks.speed.subjects import Subject, as_converted

NETWORKS = ("ResNet-18", "ResNet-50", "MobileNetV2")
PEER = "torch-pruning"


def measure(request: Request) -> Iterator[Row]:
    """Inference in fp32; the peer's ranking is one ratio for all layers, searched until its MACs are ours."""
    for name in NETWORKS:
        subject = Subject.of(name, request.seed)
        share = subject.macs({"dynamic": subject.dynamic})["dynamic"]
        pruned = search(subject.original, subject.image, share, False).network
        nets = {**subject.folded, PEER: dc.fold(as_converted(pruned.eval(), subject.image))}
        x = subject.batch(1).to(request.device)
        with modes.conditions("fp32"):
            arms = {arm: modes.inference(net, x, "fp32") for arm, net in nets.items()}
            with torch.inference_mode():
                race = request.effort.race(arms)
        yield from race.rows(["static", "dynamic"], macs=subject.macs(nets), subject=name, setting="inference", batch=1)
