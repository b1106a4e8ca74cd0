"""CondConv: a layer mixes E kernels with one coefficient each, predicted from its own input.

Paper: Yang, Bender, Le, Ngiam, "CondConv: Conditionally Parameterized Convolutions for Efficient Inference",
NeurIPS 2019, arXiv 1904.04971. For image b::

    alpha[b] = sigmoid(R GAP(x[b]) + r)                      [E]
    y[b] = (sum_i alpha[b, i] * W_i) conv x[b] + bias

Deviations from the paper:

* The bias stays outside the mix, so that a BatchNorm can be folded into bank and bias exactly. (The paper's networks
  have no biases where CondConv is.)
* Every layer has a router. In the authors' networks, depthwise and pointwise convolutions of one block share one.
* Training starts from a static convolution (``load_static``); the paper trains from scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dyncompress.layers.execution import dynamic_conv
from dyncompress.layers.method import Method, PerLayer, register_method
from dyncompress.layers.placement import check_placement, placed
from dyncompress.layers.router import RouterLinear, Squeeze
from dyncompress.layers.sharedbank import SharedBank, check_kernels
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs

__all__ = ["CondConv", "CondConvLayer"]


@register_method("condconv")
@dataclass(frozen=True)
class CondConv(PerLayer):
    """Options of CondConv.

    Args:
        experts: Kernels per layer, E, at least 1.
        placement: ``"auto"``: leave layers static, or give them fewer kernels, where a bank costs more than
            it can give; ``"all"``: a bank of E everywhere.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 1904.04971; timm's networks have 4 and 8 experts.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = (
        "CondConv: Conditionally Parameterized Convolutions for Efficient Inference, arXiv 1904.04971"
    )
    adapts: ClassVar[str] = "a mix per layer"

    experts: int = 4
    placement: Literal["auto", "all"] = "auto"

    def __post_init__(self) -> None:
        check_kernels("experts", self.experts, "2 (1 leaves layers static)")
        check_placement(self.placement)

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """CondConv, with fewer kernels or not at all by the rule that `DyNet.place` describes: mixing costs the same.

        Example:
            >>> CondConv(experts=8).place(ConvSite("c", ConvSpec(32, 32, (3, 3)), positions=64))[0].experts
            4
        """
        return placed(self, "experts", site)

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image: conv = P * S, kernels = E * P, router = in * E.

        S are output positions, P weights of one static kernel.

        Example:
            >>> CondConv(experts=4).macs([ConvSite("c", ConvSpec(16, 32, (3, 3)), positions=64)])
            [Macs(conv=294912, kernels=18432, router=64)]
        """
        return [
            Macs(
                conv=site.spec.kernel_params * site.positions,
                kernels=self.experts * site.spec.kernel_params,
                router=site.spec.in_channels * self.experts,
            )
            for site in sites
        ]

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: bank E * P, bias, router (in + 1) * E."""
        return [
            self.experts * (site.spec.kernel_params + site.spec.in_channels + 1)
            + site.spec.out_channels * site.spec.bias
            for site in sites
        ]

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site."""
        return [CondConvLayer(site.spec, self.experts) for site in sites]


class CondConvLayer(SharedBank):
    """A convolution that mixes E kernels.

    Args:
        spec: Shapes of the convolution.
        experts: E.
    """

    method: ClassVar[str] = "condconv"

    def __init__(self, spec: ConvSpec, experts: int) -> None:
        super().__init__(spec, experts, share=0.5)
        self.squeeze = Squeeze(spec.in_channels)
        self.router = RouterLinear(spec.in_channels, experts)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        return dynamic_conv(x, self.bank, self.coefficients(x).unsqueeze(1), self.bias, self.spec)

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients [B, E] in (0, 1) of x [B, in, *size]; fp32 at least."""
        return torch.sigmoid(self.router(self.squeeze(x)))

    def extra_repr(self) -> str:
        """Method, shapes and E."""
        return f"{super().extra_repr()}, experts={self.kernels}"
