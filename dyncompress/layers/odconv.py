"""ODConv: attention along all four dimensions of a bank of kernels: position, input channel, output channel, kernel.

Paper: Li, Zhou, Yao, "Omni-Dimensional Dynamic Convolution", ICLR 2022, arXiv 2209.07947. For image b, with
h = relu(U GAP(x[b]) + u) and T that falls from 30 to 1::

    c = 2 sigmoid(C h / T)     [in]         f = 2 sigmoid(F h / T)   [out]
    s = 2 sigmoid(S h / T)     [*kernel]    k = softmax(K h / T)     [K]
    y[b] = f * ((sum_i k_i * s * W_i) conv (c * x[b])) + bias

As in the authors' code there is no f where the convolution is depthwise, no s where it is 1x1, and no k for one kernel.
c and f are applied to the images, which costs less than to kernels; a single image's kernel takes them in where it is
smaller than the maps. Of one kernel, 1x1 or with ``spatial=False``, nothing is left to mix: it is a plain convolution.

Deviations from the paper:

* Each sigmoid has a factor 2, so that it starts at 1 and kernels at the scale of static ones. Same functions: the
  paper's with kernels divided by 2 for each of c, f and s.
* With ``router="block"`` the layers of a block share h, of the first one's input, as in DyNet.
* No BatchNorm in the router: it mixes the images of a batch, and knows no batch of one in training.
* A bias, which authors' code has none of, stays outside.
* Kernels and positions are mixed by one product per position; K kernels per image are never in memory.
* Temperature falls within a part of the training (``warmup``), not within 10 epochs, and is part of the state dict.
* Training starts from a static convolution (``load_static``), whatever the temperature is; the paper trains from
  scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dyncompress.layers.annealing import Temperature, check_annealing
from dyncompress.layers.channels import per_channel
from dyncompress.layers.execution import convolve, dynamic_conv
from dyncompress.layers.inference import ScaledConv, parts_of
from dyncompress.layers.method import Method, register_method
from dyncompress.layers.mixing import kernels_of
from dyncompress.layers.options import check_choice, check_flag
from dyncompress.layers.placement import affordable, better_static, check_placement, pays
from dyncompress.layers.router import Handover, RouterLinear, Squeeze, squeezed
from dyncompress.layers.sharedbank import SharedBank, check_kernels
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static

__all__ = ["ODConv", "ODConvLayer"]

_REDUCTION, _LEAST_HIDDEN = 16, 16


class Heads(NamedTuple):
    """How many coefficients of each kind a layer has; 0 where it does without."""

    channels: int
    filters: int
    taps: int
    kernels: int


@register_method("odconv")
@dataclass(frozen=True)
class ODConv:
    """Options of ODConv.

    Args:
        kernels: Kernels per layer, K: the paper's "ODConv (1x)" and "(4x)" are 1 and 4.
        spatial: Whether positions within a kernel have attention. Without it, and with one kernel, no kernel is
            assembled: attention costs the router, and one product per pixel.
        router: ``"layer"``: each layer squeezes its own input; ``"block"``: layers of a block read that of the first,
            through one hidden layer, which takes fewer calls.
        temperature: Where training begins.
        warmup: Part of the training within which the temperature falls to 1.
        placement: ``"auto"``: give layers fewer kernels, then no spatial attention, where mixing costs more than it can
            give, and leave depthwise and tiny ones static; ``"all"``: everything everywhere.
        linear: Whether linear layers are sites, too: as pointwise convolutions over the tokens of an image, whose mean
            the router reads. The paper has none.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 2209.07947; hidden units max(in / 16, 16) and temperature 30 -> 1 as in the paper's code.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "Omni-Dimensional Dynamic Convolution, ICLR 2022, arXiv 2209.07947"

    kernels: int = 1
    spatial: bool = True
    router: Literal["layer", "block"] = "layer"
    temperature: float = 30.0
    warmup: float = 0.1
    placement: Literal["auto", "all"] = "auto"
    linear: bool = False

    def __post_init__(self) -> None:
        check_kernels("kernels", self.kernels, "1")
        check_flag("spatial", self.spatial, "whether it's wanted")
        check_flag("linear", self.linear, "whether linear layers are wanted")
        check_choice("router", self.router, ("block", "layer"))
        check_annealing(self.temperature, self.warmup)
        check_placement(self.placement)

    @property
    def sharing(self) -> Literal["layer", "block"]:
        """Which layers are built together, as ``router`` says."""
        return self.router

    @property
    def adapts(self) -> str:
        """What depends on the input."""
        return "scales per channel" + ", tap" * self.spatial + ", kernel" * (self.kernels > 1)

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """ODConv, with so many kernels as measured cost allows; where not even one can be assembled, plain.

        The rule is that of `DyNet.place`, but attention to channels costs next to nothing and stays.

        Example:
            >>> method, reason = ODConv(kernels=4).place(ConvSite("c", ConvSpec(256, 256, (3, 3)), positions=49))
            >>> print(method.kernels, method.spatial)
            1 False
        """
        if self.placement == "all":
            return self, ""
        if reason := better_static(site):
            return Static(), reason
        count, why = affordable(self.kernels, site)
        method = replace(self, kernels=max(1, count))
        changes = [f"kernels {self.kernels} -> {method.kernels}: {why}"] if why else []
        if method.kernels == 1 and _heads(self, site.spec).taps and not pays(1, site):
            method = replace(method, spatial=False)
            changes.append("no spatial attention, which would assemble a kernel")
        return (method, "; ".join(changes)) if changes else (self, "")

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image: conv = P * S, kernels = K * P, router = hidden * (in + coefficients).

        S are output positions, P weights of one static kernel; there are in + out + prod(kernel) + K coefficients, less
        those of the attentions that a layer does without. One kernel without spatial attention is not assembled. Layers
        that read another's hidden units pay hidden * coefficients alone.

        Example:
            >>> site = ConvSite("c", ConvSpec(16, 32, (3, 3)), positions=64)
            >>> ODConv(kernels=4).macs([site])  # 16 * (16 + 16 + 32 + 9 + 4)
            [Macs(conv=294912, kernels=18432, router=1232)]
            >>> ODConv(kernels=1, spatial=False).macs([site])
            [Macs(conv=294912, kernels=0, router=1024)]
        """
        costs = []
        for site, (hidden, read) in zip(sites, self._routers(sites), strict=True):
            heads, weights = _heads(self, site.spec), site.spec.kernel_params
            mixed = self.kernels * weights if heads.taps or heads.kernels else 0
            router = hidden * (read + sum(heads))
            costs.append(Macs(weights * site.positions, mixed, router))
        return costs

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: bank K * P, bias, router (in + 1) * hidden + (hidden + 1) * coefficients.

        The hidden layer, (in + 1) * hidden, is that of the layer which squeezes.
        """
        counts = []
        for site, (hidden, read) in zip(sites, self._routers(sites), strict=True):
            spec = site.spec
            router = (read + 1) * hidden * (read > 0) + (hidden + 1) * sum(_heads(self, spec))
            counts.append(self.kernels * spec.kernel_params + spec.out_channels * spec.bias + router)
        return counts

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site; with ``router="block"`` the first one squeezes the input for all."""
        handover = Handover(readers=len(sites) - 1) if self.router == "block" and len(sites) > 1 else None
        layers: list[nn.Module] = []
        for index, (site, (hidden, read)) in enumerate(zip(sites, self._routers(sites), strict=True)):
            squeeze, reader = (Squeeze(read, hidden), None) if read else (None, index - 1)
            temperature = Temperature(self.temperature, self.warmup)
            heads = _heads(self, site.spec)
            layers.append(ODConvLayer(site.spec, self.kernels, heads, temperature, hidden, squeeze, handover, reader))
        return layers

    def _routers(self, sites: Sequence[ConvSite]) -> list[tuple[int, int]]:
        """Per site: hidden units of its router, and channels that it squeezes itself; 0 where it reads another's."""
        if self.router == "layer":
            return [(_hidden(site.spec), site.spec.in_channels) for site in sites]
        hidden = _hidden(sites[0].spec)
        return [(hidden, sites[0].spec.in_channels), *((hidden, 0) for _ in sites[1:])]


def _heads(method: ODConv, spec: ConvSpec) -> Heads:
    taps = prod(spec.kernel_size)
    return Heads(
        channels=spec.in_channels,
        filters=0 if spec.in_channels == spec.out_channels == spec.groups else spec.out_channels,
        taps=taps if method.spatial and taps > 1 else 0,
        kernels=method.kernels if method.kernels > 1 else 0,
    )


def _hidden(spec: ConvSpec) -> int:
    return max(_LEAST_HIDDEN, spec.in_channels // _REDUCTION)


class ODConvLayer(SharedBank):
    """A convolution with attention to its channels, and to positions and kernels of its bank.

    Args:
        spec: Shapes of the convolution.
        kernels: K.
        heads: Coefficients of each kind.
        temperature: Of the coefficients.
        hidden: Units that the router reads.
        squeeze: Squeezes this layer's input to them; None for a layer that reads another's.
        handover: What the layers of a block share; None for a layer on its own.
        reader: This layer's place in the handover; None for the layer that writes.
    """

    method: ClassVar[str] = "odconv"

    def __init__(
        self,
        spec: ConvSpec,
        kernels: int,
        heads: Heads,
        temperature: Temperature,
        hidden: int,
        squeeze: Squeeze | None,
        handover: Handover | None,
        reader: int | None,
    ) -> None:
        super().__init__(spec, kernels, share=1 / kernels, taps=heads.taps > 0)
        self.heads = heads
        self.squeeze = squeeze
        self.router = RouterLinear(hidden, sum(heads))  # all heads in one product
        self.temperature = temperature
        self.handover, self.reader = handover, reader
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        channels, filters, eta = self.coefficients(x)
        if x.shape[0] == 1 and self.spec.kernel_params <= x.numel():
            return convolve(x, self.kernel(channels, filters, eta), self.bias, self.spec, self.groups)
        x = x * per_channel(channels, x)
        if eta is None:
            out = convolve(x, self.bank[0, 0], None, self.spec, self.groups)
        else:
            out = dynamic_conv(x, self.bank, eta, None, self.spec)
        if filters is not None:
            out = out * per_channel(filters, out)
        return out if self.bias is None else out + per_channel(self.bias, out)

    def kernel(self, channels: Tensor, filters: Tensor | None, eta: Tensor | None) -> Tensor:
        """Of the only image of a batch, with all attention in it: [out, in / groups, *kernel]."""
        shape = self.spec.weight_shape
        kernel = self.bank[0, 0] if eta is None else kernels_of(self.bank, eta, shape)[0]
        groups = kernel.unflatten(0, (self.groups, -1))  # [groups, out / groups, in / groups, *kernel]
        scale = channels.to(kernel.dtype).reshape(self.groups, 1, -1, *(1,) * self.spec.ndim)
        if filters is not None:
            scale = scale * filters.to(kernel.dtype).reshape(self.groups, -1, 1, *(1,) * self.spec.ndim)
        scaled: Tensor = groups * scale
        return scaled.flatten(0, 1)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of x [B, in, *size], or of the input of its block, in fp32 at least.

        Returns:
            channels [B, in] and filters [B, out], both in (0, 2), and what mixes the bank, [B, taps, K]. None where the
            layer does without.
        """
        logits = self.temperature(self.router(squeezed(x, self.squeeze, self.handover, self.reader)))
        scales = 2 * torch.sigmoid(logits)  # of all heads at once: small layers are as many calls as they make
        channels, filters, taps, _ = scales.split(tuple(self.heads), dim=1)
        eta = None
        if self.heads.kernels:
            eta = torch.softmax(logits[:, -self.heads.kernels :], dim=1).unsqueeze(1)
        if self.heads.taps:
            eta = taps.unsqueeze(2) if eta is None else taps.unsqueeze(2) * eta
        return channels, filters if self.heads.filters else None, eta

    @classmethod
    def shipped(cls, layers: Sequence[ODConvLayer]) -> list[nn.Module]:
        """As :class:`dyncompress.layers.inference.ScaledConv` where all scale channels alone, else as they are."""
        if any(layer.heads.taps or layer.heads.kernels for layer in layers):
            return list(layers)
        assert layers[0].squeeze is not None
        rows = [(layer.temperature(layer.router.weight), layer.temperature(layer.router.bias)) for layer in layers]
        parts = parts_of(rows, layers[0].squeeze.reduce)
        return [
            ScaledConv(layer.spec, layer.bank[0, 0], layer.bias, layer.heads.filters > 0, part, cls.method)
            for layer, part in zip(layers, parts, strict=True)
        ]

    def anneal(self, progress: float) -> None:
        """Lower the temperature; see :class:`dyncompress.layers.annealing.Temperature`."""
        self.temperature.anneal(progress)

    def extra_repr(self) -> str:
        """Method, shapes, K, which attention it has, and whose input the router reads."""
        kinds = ", ".join(kind for kind, count in self.heads._asdict().items() if count)
        source = "" if self.squeeze is not None else ", routed by its block's input"
        return f"{super().extra_repr()}, kernels={self.kernels}, attention to {kinds}{source}"
