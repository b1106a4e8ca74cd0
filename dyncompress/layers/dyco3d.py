"""DyCo3D: a pointwise convolution whose kernel is generated, whole, from the instance that it is applied to.

Paper: He, Shen, van den Hengel, "DyCo3D: Robust Instance Segmentation of 3D Point Clouds through Dynamic Convolution",
CVPR 2021, arXiv 2011.13328. A point cloud's instances are the samples of a batch, x [instances, in, N]::

    h = relu(U GAP(x[b]) + u)                    [hidden]
    W[b], bias[b] = A h + a                      all weights and biases of the layer
    y[b] = W[b] x[b] + bias[b]

There is no bank: A has a row for every weight. What a layer sees of an instance beside its features, such as the
positions of the points relative to its centre, are channels of its input.

Deviations from the paper:

* A layer generates its kernel from its own input; the paper's controller generates two layers at once, from features
  that were pooled over the instance before.
* The controller has a hidden layer that keeps A small; ``hidden=0`` leaves it out, as in the authors' code.
* Training starts from a static convolution (``load_static``): A is 0, and a is the static kernel. In the paper A is
  normal with a deviation of 0.01, and a is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dyncompress.layers.execution import convolve_each
from dyncompress.layers.method import DynamicConv, Method, PerLayer, register_method
from dyncompress.layers.options import check_count
from dyncompress.layers.placement import better_static, check_placement
from dyncompress.layers.router import RouterLinear, Squeeze
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static

__all__ = ["DyCo3d", "DyCo3dConv"]

_MOST_HIDDEN = 1024
_SHARE = 5  # generating a kernel may take a fifth of the convolution


@register_method("dyco3d")
@dataclass(frozen=True)
class DyCo3d(PerLayer):
    """Options of DyCo3D.

    Args:
        hidden: Units between an instance and its kernel; 0 for none, which is the authors' controller, with a row of
            ``in`` weights for every weight of the kernel.
        placement: ``"auto"``: pointwise layers on so many positions that generating their kernel takes at most a
            fifth of the convolution; ``"all"``: all pointwise layers.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 2011.13328.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = (
        "DyCo3D: Robust Instance Segmentation of 3D Point Clouds through Dynamic Convolution, CVPR 2021,"
        " arXiv 2011.13328"
    )
    adapts: ClassVar[str] = "the whole kernel"

    hidden: int = 8
    placement: Literal["auto", "all"] = "auto"

    def __post_init__(self) -> None:
        advice = f"1 to {_MOST_HIDDEN}, or 0 for no such layer"
        check_count("hidden", self.hidden, "units", 0, _MOST_HIDDEN, advice)
        check_placement(self.placement)

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """DyCo3D for pointwise convolutions, static for others.

        Example:
            >>> DyCo3d().place(ConvSite("c", ConvSpec(64, 64, (3,)), positions=1024))[1]
            'static: a kernel of 3, and only pointwise ones are generated'
            >>> DyCo3d().place(ConvSite("c", ConvSpec(64, 64, (1,)), positions=32))[1]
            'static: generating the kernel takes 25 % of the conv (32 positions), above 20 %'
        """
        if max(site.spec.kernel_size) > 1:
            size = "x".join(map(str, site.spec.kernel_size))
            return Static(), f"static: a kernel of {size}, and only pointwise ones are generated"
        if self.placement == "all":
            return self, ""
        if reason := better_static(site):
            return Static(), reason
        features = _features(self, site.spec)
        if _SHARE * features > site.positions:
            share = f"{100 * features / site.positions:.0f} % of the conv ({site.positions} positions), above 20 %"
            return Static(), f"static: generating the kernel takes {share}"
        return self, ""

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per instance: conv = P * S, kernels = hidden * (P + out), router = in * hidden.

        S are points, P weights of the kernel; ``out`` only where there is a bias. Without a hidden layer kernels =
        in * (P + out), and router = 0.

        Example:
            >>> DyCo3d().macs([ConvSite("c", ConvSpec(19, 16, (1,)), positions=1024)])
            [Macs(conv=311296, kernels=2560, router=152)]
        """
        return [
            Macs(
                conv=site.spec.kernel_params * site.positions,
                kernels=_features(self, site.spec) * _generated(site.spec),
                router=site.spec.in_channels * self.hidden,
            )
            for site in sites
        ]

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: (hidden + 1) * (P + out) for A and a, and (in + 1) * hidden."""
        return [
            (_features(self, site.spec) + 1) * _generated(site.spec) + (site.spec.in_channels + 1) * self.hidden
            for site in sites
        ]

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site."""
        return [DyCo3dConv(site.spec, self.hidden) for site in sites]


def _features(method: DyCo3d, spec: ConvSpec) -> int:
    """What a kernel is generated from."""
    return method.hidden or spec.in_channels


def _generated(spec: ConvSpec) -> int:
    """Weights and biases of one layer."""
    return spec.kernel_params + spec.out_channels * spec.bias


class DyCo3dConv(DynamicConv):
    """A convolution whose kernel and bias are an affine map of its squeezed input.

    Args:
        spec: Shapes of the convolution; those of any kernel, though only pointwise ones are placed.
        hidden: Units of the controller's hidden layer; 0 for none.
    """

    method: ClassVar[str] = "dyco3d"
    bias: nn.Parameter | None

    def __init__(self, spec: ConvSpec, hidden: int) -> None:
        super().__init__(spec)
        self.squeeze = Squeeze(spec.in_channels, hidden)
        self.router = RouterLinear(hidden or spec.in_channels, _generated(spec))  # the kernel, then the bias
        self.register_parameter("bias", None)  # one that is not generated; see `absorb`
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from scratch: nn.ConvNd's default, and deviations of 0.01 from it."""
        if self.squeeze.reduce is not None:
            self.squeeze.reduce.reset_parameters()
        bound = 1 / math.sqrt(math.prod(self.spec.weight_shape[1:]))
        nn.init.normal_(self.router.weight, std=0.01)
        nn.init.uniform_(self.router.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        return convolve_each(x, self.squeeze(x), self.generate, self.bias, self.spec)

    def generate(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernels [B, out, in / groups, *kernel] and biases [B, out; fp32 at least] of h [B, hidden]."""
        kernels, biases = self.router(h).tensor_split((self.spec.kernel_params,), dim=1)
        kernels = kernels.to(self.router.weight.dtype).unflatten(1, self.spec.weight_shape)
        return kernels, biases if self.spec.bias else None

    def start(self, weight: Tensor, bias: Tensor, spare: Tensor | None, generator: torch.Generator | None) -> None:
        """Every instance gets the static kernel. The spare filters have no place in it."""
        nn.init.zeros_(self.router.weight)
        kernel, offset = self.router.bias.tensor_split((self.spec.kernel_params,))
        kernel.copy_(weight.flatten())
        if self.spec.bias:
            offset.copy_(bias)

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """See :meth:`DynamicConv.absorb`: each row of the controller belongs to an output channel."""
        rows, out = self.spec.kernel_params // self.out_channels, self.out_channels
        factors = torch.cat([scale.repeat_interleave(rows), scale]) if self.spec.bias else scale.repeat_interleave(rows)
        weight, offset = self.router.weight, self.router.bias
        weight.data = (weight.data * factors.unsqueeze(1)).to(weight.dtype)
        offset.data = (offset.data * factors).to(offset.dtype)
        if self.spec.bias:
            offset.data[-out:] += shift.to(offset.dtype)
        else:
            self.absorb_in_bias(scale, shift, offset.dtype)
        return True

    def extra_repr(self) -> str:
        """Method, shapes and units."""
        hidden = 0 if self.squeeze.reduce is None else self.squeeze.reduce.out_features
        return f"{super().extra_repr()}, hidden={hidden}"
