"""Other people's dynamic convolutions, each with its own predictor, at the shape of a given convolution.

CondConv is timm's. ODConv and KernelWarehouse are their authors' code, loaded from a clone on this machine: it is
neither part of this repository nor installed. They are public under the Apache licence:

    git clone https://github.com/OSVAI/ODConv          # measured at 0901cc1
    git clone https://github.com/OSVAI/KernelWarehouse # measured at a4ac17d
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.operators  # noqa: F401 - before anything imports torchvision
from benchmarks.speed.request import Request
from dyncompress.layers import ConvSite, ConvSpec, get_method

EXPERTS = 4
_LAYERS = 4  # of a warehouse, as in a stage of the authors' networks

Build = Callable[[nn.Conv2d, int], nn.Module]
"""Takes the convolution and its output positions."""


def builders(request: Request) -> dict[str, Build]:
    """Who takes part, by name: the convolution itself first, ours second."""
    found: dict[str, Build] = {"static": lambda conv, _: conv, "dynet": dynet, "CondConv": CondConv}
    if request.odconv is not None:
        found["ODConv 4x"] = partial(odconv, load(request.odconv / "modules/odconv.py"))
    if request.kernelwarehouse is not None:
        module = load(request.kernelwarehouse / "modules/kernel_warehouse.py")
        for ratio in (1, 4):
            found[f"KernelWarehouse {ratio}x"] = partial(Warehouse, module, ratio)
    return found


def commits(request: Request) -> dict[str, str]:
    """What the clones are at."""
    clones = {"ODConv": request.odconv, "KernelWarehouse": request.kernelwarehouse}
    ask = ["git", "rev-parse", "--short", "HEAD"]
    return {
        name: subprocess.run(ask, cwd=path, capture_output=True, text=True, check=True).stdout.strip()
        for name, path in clones.items()
        if path is not None
    }


def dynet(conv: nn.Conv2d, positions: int) -> nn.Module:
    """Ours: a bank of 4 kernels per output channel, and a router of its own that looks at its input."""
    method = get_method("dynet", g=EXPERTS, placement="all")
    (layer,) = method.build([ConvSite("conv", ConvSpec.of(conv), positions)])
    with torch.no_grad():
        layer.router.weight.normal_(0, 0.1)
    return layer


class CondConv(nn.Module):
    """timm's layer, routed as its networks do: sigmoid(Linear(GAP(x)))."""

    def __init__(self, conv: nn.Conv2d, positions: int) -> None:
        super().__init__()
        from timm.layers import CondConv2d

        self.router = nn.Linear(conv.in_channels, EXPERTS)
        self.conv = CondConv2d(*_channels(conv), **_shape(conv), num_experts=EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']."""
        return self.conv(x, torch.sigmoid(self.router(F.adaptive_avg_pool2d(x, 1).flatten(1))))  # type: ignore[no-any-return]


def odconv(module: ModuleType, conv: nn.Conv2d, positions: int) -> nn.Module:
    """Four kernels, attention along all four dimensions, its defaults otherwise."""
    return module.ODConv2d(*_channels(conv), **_shape(conv), kernel_num=EXPERTS)  # type: ignore[no-any-return]


class Warehouse(nn.Module):
    """One layer of four that share a warehouse with so many times the parameters of their static kernels."""

    def __init__(self, module: ModuleType, ratio: int, conv: nn.Conv2d, positions: int) -> None:
        super().__init__()
        manager = module.Warehouse_Manager(reduction=0.0625, cell_num_ratio=ratio)
        self.layers = nn.ModuleList(
            manager.reserve(*_channels(conv), **_shape(conv), bias=False) for _ in range(_LAYERS)
        )
        manager.store()
        manager.allocate(self)
        self.manager = manager

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']."""
        return self.layers[0](x)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Warehouse:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # It is no buffer of theirs, and would travel to the device in every forward pass.
        for layer in self.layers:
            layer.attention.temp_bias = fn(layer.attention.temp_bias)
        return self


def _channels(conv: nn.Conv2d) -> tuple[int, int]:
    return conv.in_channels, conv.out_channels


def _shape(conv: nn.Conv2d) -> dict[str, Any]:
    numbers = {name: getattr(conv, name)[0] for name in ("kernel_size", "stride", "padding", "dilation")}
    return {**numbers, "groups": conv.groups}


def load(path: Path) -> ModuleType:
    """A file as a module; it imports nothing of its repository."""
    spec = spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
