"""DyNet: each output channel mixes its own g kernels with coefficients predicted from the block's input.

Paper: Zhang, Zhang, Wang, Wang, "DyNet: Dynamic Convolution for Accelerating Convolutional Neural Networks",
arXiv 2004.10694. For image b and output channel t::

    eta[b, t, i] = sigmoid(router(GAP(x_block[b])))[t, i]
    y[b, t] = (sum_i eta[b, t, i] * bank[t, i]) conv x[b] + bias[t]

Deviations from the paper:

* The bias stays outside the mix, so that a BatchNorm can be folded into bank and bias exactly.
* The rows of a block's router live in the layers that they serve: same arithmetic, and each layer is whole.
* With ``reduction`` a ReLU stands between the two linear layers (the paper's text names none).
* Mixed kernels run as the shapes ask, not by training or inference (``execution``).
* Training starts from a static convolution (``load_static``); the paper trains from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.layers.execution import dynamic_conv
from dyncompress.layers.inference import MixedConv, arranged, parts_of
from dyncompress.layers.method import DynamicConv, Method, register_method
from dyncompress.layers.options import check_choice
from dyncompress.layers.placement import check_placement, placed
from dyncompress.layers.router import Handover, RouterLinear, Squeeze, squeezed
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.warmstart import atoms

__all__ = ["DyNet", "DyNetConv"]

# A router of more weights than this gets a hidden layer: its matrix is read once per image, as a bank is.
_ROUTER_LIMIT = 1 << 16
_ROUTER_REDUCTION = 4  # as the paper has in its ResNets
_MOST_KERNELS = 1024  # per output channel; a bank of more is a slip of the pen
# Initial logits of a warm start: far enough apart that the anchor carries the static kernel (sigmoid 0.88 and
# 0.12), close enough to zero that the gradient of the sigmoid (0.1) still trains the router.
_ANCHOR_LOGIT, _ATOM_LOGIT = 2.0, -2.0


@register_method("dynet")
@dataclass(frozen=True)
class DyNet:
    """Options of DyNet.

    Args:
        g: Kernels per output channel, at least 1.
        router: ``"block"``: the layers built together read one squeezed input, that of the first;
            ``"layer"``: each its own.
        reduction: 0 for one linear layer; r > 0 for two with max(8, channels // r) hidden units; by default 4 where one
            layer would have more than 65,536 weights, 0 elsewhere.
        placement: ``"auto"``: leave layers static, or give them fewer kernels, where a bank costs more than
            it can give; ``"all"``: a bank of g everywhere.
        group_width: Input channels that each kernel of a depthwise convolution reads: its own and, at 6 as in the
            paper's Dy-mobile, 5 others; fewer where the channels are no multiple.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 2004.10694, sections 3.2 and 3.3; the paper has g = 6, and reduction 4 in its ResNets.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "DyNet: Dynamic Convolution for Accelerating Convolutional Neural Networks, arXiv 2004.10694"
    adapts: ClassVar[str] = "a mix per output channel"

    g: int = 4
    router: Literal["block", "layer"] = "block"
    reduction: int | None = None
    placement: Literal["auto", "all"] = "auto"
    group_width: int = 1

    def __post_init__(self) -> None:
        if type(self.g) is not int or not 1 <= self.g <= _MOST_KERNELS:
            raise DynCompressError(
                f"g {shown(self.g)} is no number of kernels: give 2 to {_MOST_KERNELS} (1 leaves layers static)"
            )
        check_choice("router", self.router, ("block", "layer"))
        if self.reduction is not None and (type(self.reduction) is not int or self.reduction < 0):
            raise DynCompressError(
                f"reduction {shown(self.reduction)} is no divisor of channels: give one such as 4, 0 for one linear"
                " layer, or None to leave it to the size of the router"
            )
        check_placement(self.placement)
        if type(self.group_width) is not int or not 1 <= self.group_width <= _MOST_KERNELS:
            raise DynCompressError(
                f"group_width {shown(self.group_width)} is no number of channels: give 1, which leaves depthwise"
                f" convolutions depthwise, to {_MOST_KERNELS}"
            )

    @property
    def sharing(self) -> Literal["layer", "block"]:
        """Which layers are built together, as ``router`` says."""
        return self.router

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """DyNet, with fewer kernels or not at all where measured cost says that a bank does not pay.

        Depthwise and tiny convolutions stay static. Elsewhere g halves until there are 16 output positions per
        kernel, or 56 where the bank is too large for the cache; with one kernel left the layer is static.

        Example:
            >>> method, reason = DyNet(g=4).place(ConvSite("c", ConvSpec(256, 256, (3, 3)), positions=196))
            >>> print(reason)
            g 4 -> 2: mixing 9.4 MB of kernels, from memory, takes 23 % of the conv (196 positions), above 20 %
        """
        return placed(self, "g", self._widened(site))

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image, with S output positions and P weights of one static kernel.

        conv = P * S, kernels = g * P, router = features * out * g. Features are the channels of the layer
        that owns the router; with ``reduction`` its hidden units, and the owner pays channels * hidden too. A
        depthwise kernel has ``group_width`` times its weights.

        Example:
            >>> DyNet(g=4).macs([ConvSite("c", ConvSpec(16, 32, (3, 3)), positions=64)])
            [Macs(conv=294912, kernels=18432, router=2048)]
        """
        costs = []
        sites = list(map(self._widened, sites))
        for site, (channels, hidden, owns) in zip(sites, self._routers(sites), strict=True):
            router = (hidden or channels) * site.spec.out_channels * self.g + channels * hidden * owns
            kernels = self.g * site.spec.kernel_params
            costs.append(Macs(site.spec.kernel_params * site.positions, kernels, router))
        return costs

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: bank g * P, bias, router (features + 1) * out * g, hidden layer in the owner."""
        counts = []
        sites = list(map(self._widened, sites))
        for site, (channels, hidden, owns) in zip(sites, self._routers(sites), strict=True):
            out = site.spec.out_channels
            router = ((hidden or channels) + 1) * out * self.g + (channels + 1) * hidden * owns
            counts.append(self.g * site.spec.kernel_params + out * site.spec.bias + router)
        return counts

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site; with ``router="block"`` the first one squeezes the input for all."""
        handover = Handover(readers=len(sites) - 1) if self.router == "block" and len(sites) > 1 else None
        layers: list[nn.Module] = []
        sites = list(map(self._widened, sites))
        for index, (site, (channels, hidden, owns)) in enumerate(zip(sites, self._routers(sites), strict=True)):
            squeeze = Squeeze(channels, hidden) if owns else None
            reader = None if owns else index - 1
            layers.append(DyNetConv(site.spec, self.g, hidden or channels, squeeze, handover, reader))
        return layers

    def _widened(self, site: ConvSite) -> ConvSite:
        """A depthwise convolution as one of groups of ``group_width`` channels, or of the next fewer that divide."""
        spec = site.spec
        if self.group_width == 1 or not spec.is_depthwise or spec.out_channels != spec.in_channels:
            return site
        width = max(w for w in range(1, self.group_width + 1) if spec.in_channels % w == 0)
        return replace(site, spec=replace(spec, groups=spec.in_channels // width))

    def _routers(self, sites: Sequence[ConvSite]) -> list[tuple[int, int, bool]]:
        """Per site: channels that its router reads, its hidden units (0 for none), and whether the site owns it."""
        alone = self.router == "layer"
        found = []
        for index, site in enumerate(sites):
            served = [site] if alone else sites
            channels = served[0].spec.in_channels
            weights = channels * self.g * sum(each.spec.out_channels for each in served)
            found.append((channels, self._hidden(channels, weights), alone or index == 0))
        return found

    def _hidden(self, channels: int, weights: int) -> int:
        reduction = self.reduction
        if reduction is None:
            reduction = _ROUTER_REDUCTION if weights > _ROUTER_LIMIT else 0
        return max(8, channels // reduction) if reduction else 0


class DyNetConv(DynamicConv):
    """A convolution whose output channels each mix g kernels of their own.

    Args:
        spec: Shapes of the convolution.
        g: Kernels per output channel.
        features: Length of the squeezed input.
        squeeze: Squeezes this layer's input; None for a layer that reads another's.
        handover: What the layers of a block share; None for a layer on its own.
        reader: This layer's place in the handover; None for the layer that writes.
    """

    method: ClassVar[str] = "dynet"
    bias: nn.Parameter | None

    def __init__(
        self,
        spec: ConvSpec,
        g: int,
        features: int,
        squeeze: Squeeze | None,
        handover: Handover | None,
        reader: int | None,
    ) -> None:
        super().__init__(spec)
        self.g = g
        self.bank = nn.Parameter(torch.empty(spec.out_channels, g, *spec.weight_shape[1:]))
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.out_channels)) if spec.bias else None)
        self.squeeze = squeeze
        self.router = RouterLinear(features, spec.out_channels * g)
        self.handover = handover
        self.reader = reader
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from scratch: coefficients 1/2, a mixed kernel with the variance of nn.ConvNd's default."""
        fan_in = math.prod(self.spec.weight_shape[1:])
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(self.bank, -2 * bound / math.sqrt(self.g), 2 * bound / math.sqrt(self.g))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        return dynamic_conv(x, self.bank, self.coefficients(x), self.bias, self.spec)

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients [B, out, g] in (0, 1), of x [B, in, *size] or of the block's input; fp32 at least."""
        eta: Tensor = torch.sigmoid(self.router(squeezed(x, self.squeeze, self.handover, self.reader)))
        return eta.reshape(-1, self.spec.out_channels, self.g)

    @torch.no_grad()
    def load_static(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        spare: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Warm start: constant coefficients, atoms from discarded filters, an anchor that makes it exact.

        Kernels i >= 1 of an output channel are its atoms: the spare filters most similar to it (cosine),
        scaled to its norm, then the filter itself, each with a little noise. Kernel 0 is its anchor:
        (weight[t] - sum_{i >= 1} eta_i * bank[t, i]) / eta_0, where eta = sigmoid(+2), sigmoid(-2), ...

        See :meth:`DynamicConv.load_static` for arguments and errors; a depthwise ``weight`` is taken by wider groups,
        too, whose kernels start with zeros for all channels but one.
        """
        if weight.shape[1:2] == (1,) and self.groups < self.in_channels == self.out_channels:
            weight, spare = _spread(weight, self.in_channels // self.groups), None
        self.check_static(weight, bias, spare)
        self.router.weight.zero_()
        logits = torch.full((self.g,), _ATOM_LOGIT)
        logits[0] = _ANCHOR_LOGIT
        self.router.bias.copy_(logits.repeat(self.spec.out_channels))

        weight = weight.to("cpu", torch.float64)  # not every device knows fp64
        self.bank[:, 1:].copy_(atoms(weight, spare, self.g - 1, generator))
        # Computed from the stored atoms, so that their rounding to the bank's dtype is made up for.
        eta = torch.sigmoid(logits.double())
        rest = torch.einsum("i,ti...->t...", eta[1:], self.bank[:, 1:].to(weight))
        self.bank[:, 0].copy_((weight - rest) / eta[0])
        if self.bias is not None:
            self.bias.copy_(bias if bias is not None else torch.zeros_like(self.bias))

    @classmethod
    def shipped(cls, layers: Sequence[DyNetConv]) -> list[nn.Module]:
        """One router for the block, in its first layer; see :mod:`dyncompress.layers.inference`."""
        assert layers[0].squeeze is not None
        rows = [
            (arranged(layer.router.weight, layer.bank), arranged(layer.router.bias, layer.bank)) for layer in layers
        ]
        parts = parts_of(rows, layers[0].squeeze.reduce)
        return [
            MixedConv(layer.spec, layer.bank, layer.bias, part, cls.method)
            for layer, part in zip(layers, parts, strict=True)
        ]

    def extra_repr(self) -> str:
        """Method, shapes, g, and whose input the router reads."""
        source = "its own" if self.squeeze is not None else "its block's"
        return f"{super().extra_repr()}, g={self.g}, routed by {source} input"


def _spread(weight: Tensor, width: int) -> Tensor:
    """Depthwise kernels [out, 1, *kernel] as those of groups of so many channels: each reads its own, of all."""
    wide = weight.new_zeros(weight.shape[0], width, *weight.shape[2:])
    channel = torch.arange(weight.shape[0], device=weight.device)
    wide[channel, channel % width] = weight[:, 0]
    return wide
