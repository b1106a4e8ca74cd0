"""One layer at a time, with its own predictor, beside the static convolution of its shape and beside the peers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.speed import modes
from benchmarks.speed.peers import builders
from benchmarks.speed.request import Request
from benchmarks.speed.rows import Row
from benchmarks.speed.timing import Race

SHAPES = {  # in, out, kernel, groups, size: layers of networks at half their width
    "3x3 32-32 @56": (32, 32, 3, 1, 56),
    "3x3 64-64 @28": (64, 64, 3, 1, 28),
    "3x3 128-128 @14": (128, 128, 3, 1, 14),
    "3x3 256-256 @7": (256, 256, 3, 1, 7),
    "1x1 512-128 @14": (512, 128, 1, 1, 14),
    "1x1 32-192 @14": (32, 192, 1, 1, 14),
    "3x3 depthwise 192 @14": (192, 192, 3, 192, 14),
    "3x3 16-16 @16": (16, 16, 3, 1, 16),
    "3x3 32-32 @8": (32, 32, 3, 1, 8),
}
RUNS = {"inference": (1, 8), "training step": (8, 64)}


def measure(request: Request) -> Iterator[Row]:
    """Every shape, setting, batch size and mode; ratios to the static layer and to ours."""
    build = builders(request)
    for shape, (channels, out, kernel, groups, size) in SHAPES.items():
        torch.manual_seed(request.seed)
        conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)
        nets = {arm: make(conv, size * size) for arm, make in build.items()}
        for mode in request.ways:
            for setting, batches in RUNS.items():
                for batch in batches:
                    x = torch.randn(batch, channels, size, size, device=request.device)
                    race = _race(nets, x, setting, mode, request)
                    yield from race.rows(["dynet"], subject=shape, setting=setting, mode=mode, batch=batch)


def _race(nets: dict[str, nn.Module], x: Tensor, setting: str, mode: str, request: Request) -> Race:
    with modes.conditions(mode):
        if setting == "inference":
            arms = {arm: modes.inference(net, x, mode) for arm, net in nets.items()}
            with torch.inference_mode():
                return request.effort.race(arms)
        x.requires_grad_()  # a layer in the middle of a network passes a gradient on
        backward = partial(_send_back, torch.randn_like(nets["static"].to(x.device)(x)))
        return request.effort.race({arm: modes.training(net, x, mode, backward) for arm, net in nets.items()})


def _send_back(gradient: Tensor, output: Tensor) -> None:
    output.backward(gradient.to(output.dtype))
