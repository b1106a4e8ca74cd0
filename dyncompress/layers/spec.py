"""Shapes of a convolution as plain integers: what costs, plans and layers all agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dyncompress.errors import DynCompressError, shown

__all__ = ["ConvSite", "ConvSpec", "Macs"]

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_PADDING_NAMES = ("same", "valid")


@dataclass(frozen=True)
class ConvSpec:
    """Constructor arguments of one convolution, one to three spatial dimensions.

    Args:
        in_channels: Input channels, a multiple of ``groups``.
        out_channels: Output channels, a multiple of ``groups``.
        kernel_size: Kernel size per spatial dimension; its length is the number of dimensions.
        stride: Stride per spatial dimension.
        padding: Padding on both sides per spatial dimension, or ``"same"`` / ``"valid"`` as in torch.
        dilation: Dilation per spatial dimension.
        groups: Number of channel groups.
        bias: Whether a bias is added per output channel.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Raises:
        DynCompressError: If the arguments do not describe a convolution.

    Example:
        >>> ConvSpec(16, 32, (3, 3), stride=(2, 2), padding=(1, 1)).kernel_params
        4608
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        self._check_types()
        if self.ndim not in (1, 2, 3):
            raise DynCompressError(
                f"kernel_size {shown(self.kernel_size)} has {self.ndim} dimensions; 1, 2 or 3 are supported: "
                "leave this layer as it is"
            )
        if not self.stride:
            object.__setattr__(self, "stride", (1,) * self.ndim)
        if not self.dilation:
            object.__setattr__(self, "dilation", (1,) * self.ndim)
        if self.padding == ():
            object.__setattr__(self, "padding", (0,) * self.ndim)
        self._check_sizes()
        self._check_channels()
        self._check_padding()

    def _check_types(self) -> None:
        for field in ("in_channels", "out_channels", "groups"):
            if not _is_int(getattr(self, field)):
                raise DynCompressError(f"{field} {shown(getattr(self, field))} is no integer: give at least 1")
        for field in ("kernel_size", "stride", "padding", "dilation"):
            sizes = getattr(self, field)
            if not (isinstance(sizes, tuple) and all(map(_is_int, sizes))) and not (
                field == "padding" and isinstance(sizes, str)
            ):
                raise DynCompressError(
                    f"{field} {shown(sizes)} is no tuple of integers: give one per spatial dimension, such as (3, 3)"
                )
        if not isinstance(self.bias, bool):
            raise DynCompressError(f"bias {shown(self.bias)} is neither True nor False: say whether there is one")

    def _check_sizes(self) -> None:
        for field in ("kernel_size", "stride", "dilation"):
            sizes = getattr(self, field)
            if len(sizes) != self.ndim or min(sizes) < 1:
                raise DynCompressError(
                    f"{field} {shown(sizes)} is not {self.ndim} positive integers: give one per spatial dimension"
                )

    def _check_channels(self) -> None:
        for field in ("in_channels", "out_channels", "groups"):
            if getattr(self, field) < 1:
                raise DynCompressError(f"{field} {getattr(self, field)} is not positive: give at least 1")
        for field in ("in_channels", "out_channels"):
            if getattr(self, field) % self.groups:
                raise DynCompressError(
                    f"{field} {getattr(self, field)} is no multiple of groups {self.groups}: choose one"
                )

    def _check_padding(self) -> None:
        if not isinstance(self.padding_mode, str) or self.padding_mode not in _PADDING_MODES:
            raise DynCompressError(
                f"padding_mode {shown(self.padding_mode)} is unknown: choose one of {', '.join(_PADDING_MODES)}"
            )
        if isinstance(self.padding, str):
            if self.padding not in _PADDING_NAMES:
                raise DynCompressError(f"padding {shown(self.padding)} is unknown: give integers, 'same' or 'valid'")
            if self.padding == "same" and max(self.stride) > 1:
                raise DynCompressError(f"padding 'same' cannot hold with stride {self.stride}: give integers")
        elif len(self.padding) != self.ndim or min(self.padding) < 0:
            raise DynCompressError(
                f"padding {shown(self.padding)} is not {self.ndim} integers >= 0: give one per spatial dimension"
            )

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) -> ConvSpec:
        """The spec of a torch convolution, or of a linear layer: that is a pointwise one over positions.

        Example:
            >>> str(ConvSpec.of(nn.Conv2d(8, 8, 3, padding=1, groups=8)))
            '8 -> 8, 3x3, padding 1, groups 8'
        """
        if isinstance(conv, nn.Linear):
            return cls(conv.in_features, conv.out_features, (1,), bias=conv.bias is not None)
        return cls(
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            kernel_size=tuple(conv.kernel_size),
            stride=tuple(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else tuple(conv.padding),
            dilation=tuple(conv.dilation),
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of one static weight, (out, in / groups, *kernel)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def kernel_params(self) -> int:
        """Number of weights P of one static kernel, without the bias."""
        return math.prod(self.weight_shape)

    @property
    def is_depthwise(self) -> bool:
        """Whether every group holds one input channel (and there is more than one group)."""
        return self.groups == self.in_channels > 1

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Padding (before, after) per spatial dimension; ``"same"`` puts the odd one after, as torch does."""
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((total // 2, total - total // 2) for total in totals)
        if isinstance(self.padding, str):
            return ((0, 0),) * self.ndim
        return tuple((p, p) for p in self.padding)

    @property
    def even_pads(self) -> tuple[int, ...] | None:
        """Zeros on both sides per spatial dimension; None where the padding is uneven or no zeros."""
        if any(before != after for before, after in self.pads):
            return None
        return tuple(p for p, _ in self.pads) if self.padding_mode == "zeros" or not any(map(any, self.pads)) else None

    @property
    def is_pointwise(self) -> bool:
        """Whether the convolution is one matrix product per image: 1x1, stride 1, unpadded, ungrouped."""
        return (
            max(self.kernel_size) == 1 and max(self.stride) == 1 and not any(map(any, self.pads)) and self.groups == 1
        )

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial output size for a spatial input size.

        Example:
            >>> ConvSpec(3, 64, (7, 7), stride=(2, 2), padding=(3, 3)).output_size((224, 224))
            (112, 112)
        """
        return tuple(
            (n + sum(pad) - d * (k - 1) - 1) // s + 1
            for n, pad, d, k, s in zip(size, self.pads, self.dilation, self.kernel_size, self.stride, strict=True)
        )

    def __str__(self) -> str:
        parts = [f"{self.in_channels} -> {self.out_channels}", "x".join(map(str, self.kernel_size))]
        if max(self.stride) > 1:
            parts.append(f"stride {_sizes(self.stride)}")
        if isinstance(self.padding, str):
            parts.append(f"padding {self.padding}")
        elif any(self.padding):
            parts.append(f"padding {_sizes(self.padding)}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        if max(self.dilation) > 1:
            parts.append(f"dilation {_sizes(self.dilation)}")
        if self.groups > 1:
            parts.append(f"groups {self.groups}")
        if not self.bias:
            parts.append("no bias")
        return ", ".join(parts)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes(sizes: tuple[int, ...]) -> str:
    """One number where all dimensions agree, as one would write it."""
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))


@dataclass(frozen=True)
class ConvSite:
    """One convolution at its place in a network.

    Args:
        name: Module path, as in ``named_modules``.
        spec: Its constructor arguments.
        positions: Output positions S of one image, the product of the spatial output size.
    """

    name: str
    spec: ConvSpec
    positions: int

    def __post_init__(self) -> None:
        if self.positions < 1:
            raise DynCompressError(
                f"{self.name}: positions {self.positions} is not positive: give the number of output pixels"
            )


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one layer for one image at batch 1, in three parts.

    Args:
        conv: The convolution itself.
        kernels: Assembling this image's kernels from the bank.
        router: Predicting the coefficients from the input.

    Example:
        >>> Macs(conv=1000, kernels=40, router=5).total
        1045
    """

    conv: int
    kernels: int = 0
    router: int = 0

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.conv + other.conv, self.kernels + other.kernels, self.router + other.router)

    def __mul__(self, times: int) -> Macs:
        return Macs(times * self.conv, times * self.kernels, times * self.router)

    @property
    def total(self) -> int:
        """Multiply-adds of the whole layer."""
        return self.conv + self.kernels + self.router
