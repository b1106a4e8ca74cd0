"""Whole networks, BatchNorm folded: a student against its original and against the static network of its widths."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.speed import modes
from benchmarks.speed.request import Request
from benchmarks.speed.rows import Row
from benchmarks.speed.subjects import Subject

BATCHES = (1, 32)


def measure(request: Request) -> Iterator[Row]:
    """Inference of every network, in every mode, at every batch size."""
    for subject in Subject.all(request.seed):
        nets = subject.folded
        macs = subject.macs(nets)
        for mode in request.ways:
            for size in BATCHES:
                x = subject.batch(size).to(request.device)
                with modes.conditions(mode):
                    arms = {arm: modes.inference(net, x, mode) for arm, net in nets.items()}
                    with torch.inference_mode():
                        race = request.effort.race(arms)
                labels = {"subject": subject.name, "setting": "inference", "mode": mode, "batch": size}
                yield from race.rows(["static", "dynamic"], macs=macs, **labels)
