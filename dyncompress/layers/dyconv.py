"""DY-CNN: a layer mixes K kernels with attention over them, which sums to one.

Paper: Chen, Dai, Liu, Chen, Yuan, Liu, "Dynamic Convolution: Attention over Convolution Kernels", CVPR 2020,
arXiv 1912.03458. For image b::

    pi[b] = softmax(V relu(U GAP(x[b]) + u) / T)             [K], T falls from 30 to 1
    y[b] = (sum_k pi[b, k] * W_k) conv x[b] + sum_k pi[b, k] * bias_k

Deviations from the paper:

* The hidden layer has 8 units at least.
* Temperature falls within a part of the training (``warmup``), not within 10 epochs, and is part of the state dict.
* Training starts from a static convolution (``load_static``), whatever the temperature is; the paper trains from
  scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.layers.annealing import Temperature, check_annealing
from dyncompress.layers.channels import per_channel
from dyncompress.layers.execution import dynamic_conv
from dyncompress.layers.method import Method, PerLayer, register_method
from dyncompress.layers.mixing import full_precision
from dyncompress.layers.placement import check_placement, placed
from dyncompress.layers.router import RouterLinear, Squeeze
from dyncompress.layers.sharedbank import SharedBank, check_kernels
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs

__all__ = ["DyConv", "DyConvLayer"]

_LEAST_HIDDEN = 8  # of fewer, all could be dead


@register_method("dyconv")
@dataclass(frozen=True)
class DyConv(PerLayer):
    """Options of DY-CNN.

    Args:
        kernels: Kernels per layer, K, at least 1.
        reduction: The router has max(8, in // reduction) hidden units.
        temperature: Of the softmax where training begins.
        warmup: Part of the training within which the temperature falls to 1.
        placement: ``"auto"``: leave layers static, or give them fewer kernels, where a bank costs more than
            it can give; ``"all"``: a bank of K everywhere.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 1912.03458; the paper has K = 4, reduction 4, and temperature 30 -> 1 in its first 10 epochs.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "Dynamic Convolution: Attention over Convolution Kernels, arXiv 1912.03458"
    adapts: ClassVar[str] = "a mix per layer"

    kernels: int = 4
    reduction: int = 4
    temperature: float = 30.0
    warmup: float = 0.1
    placement: Literal["auto", "all"] = "auto"

    def __post_init__(self) -> None:
        check_kernels("kernels", self.kernels, "2 (1 leaves layers static)")
        if type(self.reduction) is not int or self.reduction < 1:
            raise DynCompressError(f"reduction {shown(self.reduction)} is no divisor of channels: give one such as 4")
        check_annealing(self.temperature, self.warmup)
        check_placement(self.placement)

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """DY-CNN, with fewer kernels or not at all by the rule that `DyNet.place` describes: mixing costs the same.

        Example:
            >>> DyConv().place(ConvSite("c", ConvSpec(8, 8, (3, 3), groups=8), positions=64))[1]
            'static: depthwise, 72 weights; mixing them takes longer than convolving'
        """
        return placed(self, "kernels", site)

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image: conv = P * S, kernels = K * P, router = in * hidden + hidden * K.

        S are output positions, P weights of one static kernel; a bias, where there is one, counts as out more weights
        of each of the K kernels.

        Example:
            >>> DyConv().macs([ConvSite("c", ConvSpec(16, 32, (3, 3), bias=False), positions=64)])
            [Macs(conv=294912, kernels=18432, router=160)]
        """
        return [
            Macs(
                conv=site.spec.kernel_params * site.positions,
                kernels=self.kernels * _weights(site.spec),
                router=(site.spec.in_channels + self.kernels) * self._hidden(site.spec),
            )
            for site in sites
        ]

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: K kernels and biases, router (in + 1) * hidden + (hidden + 1) * K."""
        return [
            self.kernels * _weights(site.spec)
            + (site.spec.in_channels + 1) * self._hidden(site.spec)
            + (self._hidden(site.spec) + 1) * self.kernels
            for site in sites
        ]

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site."""
        return [
            DyConvLayer(site.spec, self.kernels, self._hidden(site.spec), self.temperature, self.warmup)
            for site in sites
        ]

    def _hidden(self, spec: ConvSpec) -> int:
        return max(_LEAST_HIDDEN, spec.in_channels // self.reduction)


def _weights(spec: ConvSpec) -> int:
    return spec.kernel_params + spec.out_channels * spec.bias


class DyConvLayer(SharedBank):
    """A convolution that mixes K kernels, and K biases, with weights that sum to one.

    Args:
        spec: Shapes of the convolution.
        kernels: K.
        hidden: Hidden units of the router.
        temperature: Of the softmax where training begins.
        warmup: Part of the training within which it falls to 1.
    """

    method: ClassVar[str] = "dyconv"

    def __init__(self, spec: ConvSpec, kernels: int, hidden: int, temperature: float, warmup: float) -> None:
        super().__init__(spec, kernels, share=1 / kernels)
        if spec.bias:
            self.bias = nn.Parameter(torch.empty(kernels, spec.out_channels))
        self.squeeze = Squeeze(spec.in_channels, hidden)
        self.router = RouterLinear(hidden, kernels)
        self.temperature = Temperature(temperature, warmup)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        pi = self.coefficients(x)
        if self.bias is None or self.bias.ndim == 1:  # folded into a layer without one, it is the same for all kernels
            return dynamic_conv(x, self.bank, pi.unsqueeze(1), self.bias, self.spec)
        out = dynamic_conv(x, self.bank, pi.unsqueeze(1), None, self.spec)
        with full_precision(x):
            bias = pi.to(self.bias.dtype) @ self.bias
        return out + per_channel(bias, out)

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients [B, K], positive and of sum 1, of x [B, in, *size]; fp32 at least."""
        return torch.softmax(self.temperature(self.router(self.squeeze(x))), dim=1)

    def anneal(self, progress: float) -> None:
        """Lower the temperature; see :class:`dyncompress.layers.annealing.Temperature`."""
        self.temperature.anneal(progress)

    def extra_repr(self) -> str:
        """Method, shapes and K."""
        return f"{super().extra_repr()}, kernels={self.kernels}"
