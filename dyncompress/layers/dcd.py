"""DCD: a static kernel whose output channels are scaled, and a dynamic low-rank one beside it.

Paper: Li, Chen, Dai, Liu, Chen, Yu, Yuan, Liu, Chen, Vasconcelos, "Revisiting Dynamic Convolution via Matrix
Decomposition", ICLR 2021, arXiv 2103.08756: its "dynamic channel fusion". For image b::

    W[b] = Lambda(x[b]) W_0 + P Phi(x[b]) Q^T

As in the authors' code it runs on images, and no kernel is assembled::

    h = U GAP(x[b]);  h = h * hs(G h)                        squeezed, [hidden]
    q = Q^T x[b]                                             what the kernel's middle tap sees, [L, *size']
    y[b] = hs(A h) * (W_0 conv x[b]) + P (Phi q + q) + bias  with Phi = B h as [L, L], hs(z) = relu6(z + 3) / 3

The low-rank part is 1x1 whatever the kernel of W_0 is: in a larger kernel it is the middle tap, with the stride of the
convolution. It fuses all channels, so that there is none where channels are grouped: a grouped convolution has the
scale alone, and a depthwise one, which the authors keep static, too.

Deviations from the paper:

* No BatchNorm after Q and Phi, which would mix the images of a batch. In eval mode they are part of Q, B and bias.
* The squeeze is a mean over all positions; in the authors' code over quarters of the image where a layer widens, which
  is ``pool=2``.
* Training starts from a static convolution (``load_static``): the scale is 1, P is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.layers.channels import per_channel, scaled
from dyncompress.layers.execution import CONV, convolve
from dyncompress.layers.method import DynamicConv, Method, PerLayer, register_method
from dyncompress.layers.options import check_count, check_flag
from dyncompress.layers.placement import better_static, check_placement
from dyncompress.layers.router import LIMIT, RouterLinear, Squeeze
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static

__all__ = ["Dcd", "DcdConv"]

_REDUCTION = 16
_LEAST = 4  # hidden units, and dimensions of the latent space
_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_MOST_LATENT = 1024  # a latent space of more is a slip of the pen


@register_method("dcd")
@dataclass(frozen=True)
class Dcd(PerLayer):
    """Options of DCD.

    Args:
        latent: Dimensions L of the latent space, in which channels are fused; by default max(4, floor(sqrt(in))).
        placement: ``"auto"``: leave grouped, depthwise and tiny convolutions static; ``"all"``: all dynamic, grouped
            ones by their scale alone.
        pool: The router reads means over a grid of pool parts in every spatial dimension; then in * pool^ndim replaces
            in, in the sizes of hidden layer and router.
        linear: Whether linear layers are sites, too: as pointwise convolutions over the tokens of an image, whose mean
            the router reads. Of such layers the authors replace the classifier alone.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 2103.08756; L and the hidden units, max(in, L^2) / 16, as in the authors' ResNet-50.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "Revisiting Dynamic Convolution via Matrix Decomposition, ICLR 2021, arXiv 2103.08756"
    adapts: ClassVar[str] = "a low-rank difference"

    latent: int | None = None
    placement: Literal["auto", "all"] = "auto"
    pool: int = 1
    linear: bool = False

    def __post_init__(self) -> None:
        if self.latent is not None:
            advice = f"1 to {_MOST_LATENT}, or None for the square root of the input channels"
            check_count("latent", self.latent, "dimensions", 1, _MOST_LATENT, advice)
        check_count("pool", self.pool, "parts", 1, 8, "1 for the mean of the image, or 2 for those of its quarters")
        check_placement(self.placement)
        check_flag("linear", self.linear, "whether linear layers are wanted")

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """DCD, or static where channels are grouped: the low-rank part would join what groups keep apart.

        Example:
            >>> print(Dcd().place(ConvSite("c", ConvSpec(64, 64, (3, 3), groups=4), positions=3136))[1])
            static: 4 groups; dynamic channel fusion joins all channels, and is not defined within groups
        """
        if self.placement == "all":
            return self, ""
        if reason := better_static(site):
            return Static(), reason
        if site.spec.groups > 1:
            why = "dynamic channel fusion joins all channels, and is not defined within groups"
            return Static(), f"static: {site.spec.groups} groups; {why}"
        return self, ""

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image: conv = P * S, kernels = L * (in + L + out) * S, router = hidden * (...).

        S are output positions, P weights of the static kernel. Nothing is assembled: ``kernels`` is what the low-rank
        part takes in place of that. The router has in + hidden + L^2 + out weights per hidden unit.

        Example:
            >>> Dcd().macs([ConvSite("c", ConvSpec(16, 32, (3, 3)), positions=64)])  # L = 4, 4 hidden units
            [Macs(conv=294912, kernels=13312, router=272)]
        """
        costs = []
        for site in sites:
            spec, (latent, hidden) = site.spec, _sizes(self, site.spec)
            low_rank = latent * (spec.in_channels + latent + spec.out_channels) * site.positions
            costs.append(Macs(spec.kernel_params * site.positions, low_rank, _router(self, spec, latent, hidden)))
        return costs

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: P, bias, Q and P with L * (in + out), and the router, which has no biases."""
        counts = []
        for site in sites:
            spec, (latent, hidden) = site.spec, _sizes(self, site.spec)
            low_rank = latent * (spec.in_channels + spec.out_channels)
            bias = spec.out_channels * spec.bias
            counts.append(spec.kernel_params + bias + low_rank + _router(self, spec, latent, hidden))
        return counts

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site."""
        return [DcdConv(site.spec, *_sizes(self, site.spec), self.pool) for site in sites]


def _sizes(method: Dcd, spec: ConvSpec) -> tuple[int, int]:
    """Dimensions of the latent space (0 where there is none), hidden units of the router."""
    latent = max(_LEAST, math.isqrt(spec.in_channels)) if method.latent is None else method.latent
    latent = latent if spec.groups == 1 else 0
    return latent, max(_LEAST, max(_seen(method, spec), latent**2) // _REDUCTION)


def _router(method: Dcd, spec: ConvSpec, latent: int, hidden: int) -> int:
    return hidden * (_seen(method, spec) + hidden + latent**2 + spec.out_channels)


def _seen(method: Dcd, spec: ConvSpec) -> int:
    """Numbers that the router reads."""
    return int(spec.in_channels * method.pool**spec.ndim)


class DcdConv(DynamicConv):
    """A static convolution with a scale and a low-rank kernel that depend on the image.

    Args:
        spec: Shapes of the convolution.
        latent: Dimensions of the latent space; 0 for the scale alone.
        hidden: Hidden units of the router.
        pool: Parts of the image in every spatial dimension, whose means the router reads.
    """

    method: ClassVar[str] = "dcd"
    bias: nn.Parameter | None

    def __init__(self, spec: ConvSpec, latent: int, hidden: int, pool: int = 1) -> None:
        super().__init__(spec)
        self.latent = latent
        self.weight = nn.Parameter(torch.empty(spec.weight_shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.out_channels)) if spec.bias else None)
        ones = (1,) * spec.ndim
        self.register_parameter("q", nn.Parameter(torch.empty(latent, spec.in_channels, *ones)) if latent else None)
        self.register_parameter("p", nn.Parameter(torch.empty(spec.out_channels, latent, *ones)) if latent else None)
        self.squeeze = Squeeze(spec.in_channels) if pool == 1 else Parts(pool, spec.ndim)
        self.reduce = RouterLinear(spec.in_channels * pool**spec.ndim, hidden, bias=False)
        self.gate = RouterLinear(hidden, hidden, bias=False)
        self.router = RouterLinear(hidden, latent**2 + spec.out_channels, bias=False)  # Phi, then the scale
        self.reset_parameters()

    q: nn.Parameter | None
    p: nn.Parameter | None

    def reset_parameters(self) -> None:
        """Start from scratch: nn.ConvNd's default, a scale of 1, and a low-rank part of 0."""
        bound = 1 / math.sqrt(math.prod(self.spec.weight_shape[1:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        for layer in (self.reduce, self.gate, self.router):
            layer.reset_parameters()
        self._neutralise()

    @torch.no_grad()
    def _neutralise(self) -> None:
        """A scale of 1 and P = 0. Q and Phi are not zero, or P would never learn."""
        self.router.weight[self.latent**2 :].zero_()
        if self.p is not None and self.q is not None:
            nn.init.zeros_(self.p)
            nn.init.normal_(self.q, std=self.in_channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        phi, scale = self.coefficients(x)
        out = convolve(x, self.weight, None, self.spec, self.groups)
        out = out * per_channel(scale, out)
        if phi is not None and self.q is not None and self.p is not None:
            conv = CONV[self.spec.ndim]
            latent = conv(_middle(x, self.spec), self.q)
            flat = latent.flatten(2)
            fused = torch.baddbmm(flat, phi.to(flat.dtype), flat).reshape(latent.shape)
            out = out + conv(fused, self.p)
        return out if self.bias is None else out + per_channel(self.bias, out)

    def coefficients(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Phi [B, L, L] (None without a low-rank part) and the scale [B, out] in [0, 2]; fp32 at least."""
        h = self.reduce(self.squeeze(x))
        made = self.router(h * _hard_sigmoid(self.gate(h)))
        phi, scale = made.split((self.latent**2, self.out_channels), dim=1)
        return phi.unflatten(1, (self.latent, self.latent)) if self.latent else None, _hard_sigmoid(scale)

    def start(self, weight: Tensor, bias: Tensor, spare: Tensor | None, generator: torch.Generator | None) -> None:
        """W_0 is the static kernel, the scale is 1 and P is 0. The spare filters have no place in it."""
        self.weight.copy_(weight)
        self.router.weight[self.latent**2 :].zero_()
        if self.p is not None:
            self.p.zero_()

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """See :meth:`DynamicConv.absorb`: W_0 and P have output channels first."""
        for weight in (self.weight,) if self.p is None else (self.weight, self.p):
            weight.data = scaled(weight.data, scale)
        self.absorb_in_bias(scale, shift, self.weight.dtype)
        return True

    def extra_repr(self) -> str:
        """Method, shapes and L."""
        return f"{super().extra_repr()}, latent={self.latent}"


class Parts(nn.Module):
    """Means over the parts of a grid.

    Args:
        pool: Parts in every spatial dimension.
        ndim: Spatial dimensions.
    """

    def __init__(self, pool: int, ndim: int) -> None:
        super().__init__()
        self.pool, self.ndim = pool, ndim

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, channels, *size] -> [B, channels * pool^ndim], in fp32 at least; what is not finite is limited."""
        means = _POOL[self.ndim](x.to(torch.promote_types(x.dtype, torch.float32)), self.pool).flatten(1)
        return means.nan_to_num(0.0, LIMIT, -LIMIT)


def _hard_sigmoid(z: Tensor) -> Tensor:
    """relu6(z + 3) / 3, between 0 and 2 and exactly 1 at 0."""
    return F.relu6(z + 3) / 3


def _middle(x: Tensor, spec: ConvSpec) -> Tensor:
    """What the middle tap of the kernel sees at each output position: [B, in, *size']."""
    pads, index = [], []
    for size, out, (before, _), k, d, s in zip(
        x.shape[2:], spec.output_size(x.shape[2:]), spec.pads, spec.kernel_size, spec.dilation, spec.stride, strict=True
    ):
        first = d * ((k - 1) // 2) - before
        last = first + s * (out - 1)
        front = max(0, -first)
        pads.append((front, max(0, last + 1 - size)))
        index.append(slice(first + front, last + front + 1, s))
    if any(map(any, pads)):
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        x = F.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)
    return x[(slice(None), slice(None), *index)]
