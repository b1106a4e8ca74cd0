"""The networks of the zoo, by name. Nothing is built, and no library of networks imported, before `build` is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.networks import from_smp, from_timm, from_torchvision, from_transformers, handmade

NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **handmade.NETWORKS,
    **from_torchvision.NETWORKS,
    **from_timm.NETWORKS,
    **from_smp.NETWORKS,
    **from_transformers.NETWORKS,
}

FAST = """
    hand/Shuffle hand/ThreeD hand/Recurrent hand/TransposedGroups
    timm/test_resnet timm/test_byobnet timm/test_nfnet timm/test_convnext2 timm/test_efficientnet_ln timm/resnetblur18
    timm/mobilenetv2_035 timm/lcnet_050 timm/ghostnet_050 timm/dla46_c
    torchvision/shufflenet_v2_x0_5 torchvision/squeezenet1_1 torchvision/resnet18_fpn
    smp/Linknet-resnet18 transformers/resnet transformers/encodec
""".split()
"""Twenty small ones that cover many causes; `make test-slow` tries them, and `make test` some of them."""


def build(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A network of the zoo with random but lively weights, in eval mode, and an example input for it."""
    torch.manual_seed(seed)
    net, example = NETWORKS[name]()
    if not name.startswith("hand/"):  # those are lively as they come
        enliven(net, example)
    return net.eval(), example


def enliven(net: nn.Module, example: Any) -> None:
    """Give every channel a weight of its own and every BatchNorm the statistics of what it sees.

    Fresh networks start blocks at zero (LayerScale of 1e-6, zero-initialised gains) and normalise with mean 0 and
    variance 1: errors in most channels would not show in the output.
    """
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
                if parameter.flatten()[0] == 0:
                    parameter.normal_(0, 0.1)
                else:
                    parameter.uniform_(0.5, 1.5)
        norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        momenta = [m.momentum for m in norms]
        net.eval()
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        call(net, example)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_var.clamp_(min=1e-2)  # a map of one position has next to no variance


def call(net: nn.Module, example: Any) -> Any:
    """Run a network on an example, with the same random numbers each time."""
    torch.manual_seed(0)
    if isinstance(example, dict):
        return net(**example)
    return net(*example) if isinstance(example, tuple) else net(example)
