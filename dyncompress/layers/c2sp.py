"""Even-sized kernels with symmetric padding: a 3x3 convolution at 4/9 of its cost.

Paper: Wu, Wang, Tang, Chen, Shi, "Convolution with even-sized kernels and symmetric padding", NeurIPS 2019, arXiv
1903.08385. A 2x2 kernel has no centre: padded on one side it moves the image by half a pixel, layer after layer. So the
input channels are split in four, each quarter is padded at another corner, and the half pixels cancel out::

    y = sum over the quarters q of: conv_2x2(pad_q(x_q), w_q),  pads: bottom right, top left, bottom left, top right

In d dimensions there are 2^d corners, opposite ones next to each other. A 5x5 kernel becomes 4x4 (the paper's C4sp).

Deviations from the paper:

* A convolution with a stride keeps it; the paper averages 2x2 pixels first, and then convolves at stride 1.
* A kernel of k taps, dilated by d, stands for the first or the last k - 1 of them; whatever the padding was, size and
  place of the output stay as they were. For 3x3 with padding 1 these are the paper's four pads.
* With ``g`` above 1 every output channel mixes g even kernels, as in DyNet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.layers.channels import scaled
from dyncompress.layers.dynet import DyNet
from dyncompress.layers.method import DynamicConv, Method, PerLayer, register_method
from dyncompress.layers.options import check_count
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static, load_static

__all__ = ["C2sp", "EvenConv"]

_MOST_KERNELS = 1024
# Mean product of a feature with its neighbour, over its mean square: 0.32 is the square of the mean of a rectified
# normal variable over its mean square, and the rest of neighbours correlates by one half, say.
_ALIKE = 0.66


@register_method("c2sp")
@dataclass(frozen=True)
class C2sp(PerLayer):
    """Options of even-sized kernels.

    Args:
        g: Kernels per output channel; 1 for static ones, which is the paper's method.

    Raises:
        DynCompressError: If g is no number of kernels.

    Source:
        arXiv 1903.08385.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "Convolution with even-sized kernels and symmetric padding, arXiv 1903.08385"
    exceptions: ClassVar[dict[str, str]] = {
        "warm_start_is_the_static_network": "no 2x2 kernel computes what a 3x3 one does; it starts at the closest"
    }

    g: int = 1

    def __post_init__(self) -> None:
        check_count("g", self.g, "kernels", 1, _MOST_KERNELS, f"1 (static kernels) to {_MOST_KERNELS}")

    @property
    def _inner(self) -> Static | DyNet:
        return Static() if self.g == 1 else DyNet(g=self.g, router="layer", placement="all")

    @property
    def adapts(self) -> str:
        """What depends on the input."""
        return self._inner.adapts

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """Even kernels where there is an odd one; a convolution without stays static.

        Example:
            >>> C2sp().place(ConvSite("c", ConvSpec(8, 8, (1, 1)), positions=64))[1]
            'static: 1x1 has no odd side of 3 or more to shrink'
        """
        if any(_shrinks(site.spec)):
            return self, ""
        size = "x".join(map(str, site.spec.kernel_size))
        return Static(), f"static: {size} has no odd side of 3 or more to shrink"

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image: those of a convolution (or bank) of even kernels.

        Example:
            >>> C2sp().macs([ConvSite("c", ConvSpec(16, 32, (3, 3), padding=(1, 1)), positions=64)])  # 4/9 of 294,912
            [Macs(conv=131072, kernels=0, router=0)]
        """
        return [self._inner.macs([_even_site(site)])[0] for site in sites]

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: those of a convolution (or bank) of even kernels."""
        return [self._inner.params([_even_site(site)])[0] for site in sites]

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site."""
        return [EvenConv(site.spec, self._inner.build([_even_site(site)])[0]) for site in sites]


class EvenConv(DynamicConv):
    """A convolution with even-sized kernels, each part of whose input channels is seen from another corner.

    Args:
        spec: Shapes of the convolution that it replaces, with the odd kernel.
        conv: The convolution with the even kernel, unpadded.
    """

    method: ClassVar[str] = "c2sp"

    def __init__(self, spec: ConvSpec, conv: nn.Module) -> None:
        super().__init__(spec)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, [side for pair in reversed(self.spec.pads) for side in pair], mode=mode)
        parts = []
        for start, count, corner in _parts(self.spec):
            part = x.narrow(1, start, count)
            for dim, (late, gap) in enumerate(zip(corner, _gaps(self.spec), strict=True), start=2):
                part = part[(slice(None),) * dim + ((slice(gap, None) if late else slice(part.shape[dim] - gap)),)]
            parts.append(part)
        y: Tensor = self.conv(torch.cat(parts, 1))
        return y

    def start(self, weight: Tensor, bias: Tensor, spare: Tensor | None, generator: torch.Generator | None) -> None:
        """The even kernel whose output is closest to the odd one's, in the mean over smooth inputs.

        A tap that falls away is predicted from its neighbour, which takes over 0.66 of its weight: the least squares
        solution where neighbouring features have 0.66 of their mean square in common, and those that are further apart
        accordingly less.
        """
        spare = None if spare is None else self._truncate(spare)
        offset = bias if self.spec.bias else None
        load_static(self.conv, self._project(weight), offset, spare=spare, generator=generator)

    @classmethod
    def shipped(cls, layers: Sequence[EvenConv]) -> list[nn.Module]:
        """With a bank as it is shipped; see :mod:`dyncompress.layers.inference`."""
        made: list[nn.Module] = []
        for layer in layers:
            conv = layer.conv
            made.append(cls(layer.spec, type(conv).shipped([conv])[0] if isinstance(conv, DynamicConv) else conv))
        return made

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """As the convolution in it does; see :meth:`DynamicConv.absorb`."""
        conv: Any = self.conv
        if isinstance(conv, DynamicConv):
            return conv.absorb(scale, shift)
        weight, bias = conv.weight.data, 0 if conv.bias is None else conv.bias.data
        conv.weight.data = scaled(weight, scale)
        conv.bias = nn.Parameter((bias * scale + shift).to(weight.dtype))
        return True

    def _project(self, weight: Tensor) -> Tensor:
        """The weight [out, in / groups, *odd] as [out, in / groups, *even], each input channel for its corner."""
        spec = self.spec
        inputs, outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
        made = weight.new_empty(_even(spec).weight_shape)
        for start, count, corner in _parts(spec):
            for channel in range(start, start + count):
                rows = slice(channel // inputs * outputs, (channel // inputs + 1) * outputs)
                kernel = weight[rows, channel % inputs]
                for dim, (late, shrinks) in enumerate(zip(corner, _shrinks(spec), strict=True), start=1):
                    kernel = _fold(kernel, dim, late) if shrinks else kernel
                made[rows, channel % inputs] = kernel
        return made

    def _truncate(self, spare: Tensor) -> Tensor:
        """Discarded filters with as many taps as there are now: they seed a bank, and need not be close to anything."""
        for dim, size in enumerate(_even(self.spec).kernel_size, start=2):
            spare = spare.narrow(dim, 0, size)
        return spare


def _fold(kernel: Tensor, dim: int, late: bool) -> Tensor:
    """One tap less: the first (or the last) one gives its neighbour what that can predict of it."""
    kernel = kernel.flip(dim) if late else kernel
    taps = kernel.shape[dim]
    kept = kernel.narrow(dim, 0, taps - 1).clone()
    kept.narrow(dim, taps - 2, 1).add_(kernel.narrow(dim, taps - 1, 1), alpha=_ALIKE)
    return kept.flip(dim) if late else kept


def _shrinks(spec: ConvSpec) -> tuple[bool, ...]:
    """Per dimension, whether the kernel loses a tap."""
    return tuple(k >= 3 and k % 2 == 1 for k in spec.kernel_size)


def _gaps(spec: ConvSpec) -> tuple[int, ...]:
    """Per dimension, how much of the padded input the smaller kernel has no use for."""
    return tuple(d * shrinks for d, shrinks in zip(spec.dilation, _shrinks(spec), strict=True))


def _even(spec: ConvSpec) -> ConvSpec:
    """The same convolution with the even kernel, of an input that is padded already."""
    size = tuple(k - shrinks for k, shrinks in zip(spec.kernel_size, _shrinks(spec), strict=True))
    return replace(spec, kernel_size=size, padding=(0,) * spec.ndim, padding_mode="zeros")


def _even_site(site: ConvSite) -> ConvSite:
    return replace(site, spec=_even(site.spec))


def _parts(spec: ConvSpec) -> list[tuple[int, int, tuple[bool, ...]]]:
    """First channel, number of channels, and corner of every part; True for the later taps of a dimension.

    A remainder goes to the first parts. A dimension that does not shrink has one corner.
    """
    shrinks = _shrinks(spec)
    free = list(itertools.product((True, False), repeat=sum(shrinks)))
    pairs = [pair for one in free[: max(1, len(free) // 2)] for pair in (one, tuple(not late for late in one))]
    corners = pairs if any(shrinks) else [()]
    parts, start = [], 0
    for index, corner in enumerate(corners):
        count = spec.in_channels // len(corners) + (index < spec.in_channels % len(corners))
        late = iter(corner)
        if count:
            parts.append((start, count, tuple(next(late) if s else False for s in shrinks)))
        start += count
    return parts
