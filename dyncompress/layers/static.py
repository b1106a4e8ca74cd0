"""The static method: plain convolutions, the control arm and what others place where a bank is no gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError
from dyncompress.layers.method import DynamicConv, Method, PerLayer, register_method
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs

__all__ = ["Static", "load_static"]

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@register_method("static")
@dataclass(frozen=True)
class Static(PerLayer):
    """Plain ``nn.ConvNd``, no options."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    adapts: ClassVar[str] = "nothing"
    exceptions: ClassVar[dict[str, str]] = {"repr_names_the_method": "a plain nn.ConvNd prints as in torch"}

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """Every site can be static."""
        return self, ""

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image: conv = P * S.

        Example:
            >>> Static().macs([ConvSite("c", ConvSpec(16, 32, (3, 3)), positions=64)])
            [Macs(conv=294912, kernels=0, router=0)]
        """
        return [Macs(conv=site.spec.kernel_params * site.positions) for site in sites]

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: P, and one bias per output channel."""
        return [site.spec.kernel_params + site.spec.out_channels * site.spec.bias for site in sites]

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One plain convolution per site."""
        return [_conv(site.spec) for site in sites]


def _conv(spec: ConvSpec) -> nn.Module:
    conv: nn.Module = _CONV[spec.ndim](
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        bias=spec.bias,
        padding_mode=spec.padding_mode,
    )
    return conv


def load_static(
    module: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    *,
    spare: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Make any layer that a method built compute ``conv(x, weight, bias)``.

    Args:
        module: A plain convolution or a :class:`DynamicConv`.
        weight: [out, in / groups, *kernel].
        bias: [out], or None for zeros.
        spare: [n, in / groups, *kernel] discarded filters; a plain convolution has no use for them.
        generator: Random numbers of the warm start; a plain convolution needs none.

    Raises:
        DynCompressError: If the module is no convolution or a shape does not fit.

    Example:
        >>> conv = Static().build([ConvSite("c", ConvSpec(2, 3, (1,), bias=False), positions=8)])[0]
        >>> load_static(conv, torch.ones(3, 2, 1), None)
    """
    if isinstance(module, DynamicConv):
        module.load_static(weight, bias, spare=spare, generator=generator)
        return
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise DynCompressError(f"{type(module).__name__} is no convolution: give a module that a method built")
    DynamicConv(ConvSpec.of(module)).check_static(weight, bias, spare)
    with torch.no_grad():
        module.weight.copy_(weight)
        if module.bias is not None:
            module.bias.copy_(bias if bias is not None else torch.zeros_like(module.bias))
