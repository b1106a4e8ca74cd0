"""A dynamic convolution as it is shipped: nothing left in it that only training needs.

The same numbers as the layers that it is made of, by fewer and cheaper calls:

* The rows of a block's router are one matrix: one product and one sigmoid per block, not per layer.
* The bank lies in memory as [g, out, ...], so that mixing reads g long streams (one CPU thread, 256 channels, 3x3,
  g = 4: half the time of [out, g, ...], which training keeps for the sake of its gradients).
* Where channels are scaled, factors that are the same for all images are part of the kernel.
* A pointwise convolution of one image is one matrix product that adds the bias, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError
from dyncompress.layers.channels import per_channel
from dyncompress.layers.execution import CONV, convolve, dynamic_conv
from dyncompress.layers.method import DynamicConv
from dyncompress.layers.mixing import autocasts
from dyncompress.layers.router import LIMIT, Handover
from dyncompress.layers.spec import ConvSpec

__all__ = ["BlockRouter", "MixedConv", "Part", "ScaledConv", "ShippedConv", "arranged", "parts_of", "reuse_kernels"]

# torch multiplies matrices with fewer products than this in a plain loop, ten times slower than elementwise arithmetic.
_SMALL_PRODUCT = 400
_SPACE = {3: (2,), 4: (2, 3), 5: (2, 3, 4)}  # spatial dimensions by the number of all
# With the batch, where it is 1: products with vectors are faster.
_IMAGE = {3: (0, 2), 4: (0, 2, 3), 5: (0, 2, 3, 4)}
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # sums of other dtypes have their own


class BlockRouter(nn.Module):
    """Coefficients of all layers of a block from one squeezed input.

    eta = sigmoid(W h + b) with h = GAP(x), or h = ReLU(V GAP(x) + c); in fp32 at least.

    Args:
        weight: W [rows, features], of all layers of the block one after the other.
        bias: b [rows].
        hidden: V [features, channels] and c [features], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor, hidden: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        first, offset = hidden if hidden is not None else (None, None)
        for name, value in (("weight", weight), ("bias", bias), ("hidden_weight", first), ("hidden_bias", offset)):
            self.register_parameter(name, None if value is None else _constant(value))

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, channels, *size] -> coefficients [B, rows]; to be called with autocast off."""
        weight, bias, hidden, offset = self._parameters.values()  # attribute access takes as long as a small op
        shape = x.shape
        alone = shape[0] == 1 and not torch.compiler.is_compiling()
        # A mean is a sum and a slow division; the product with the weights divides as well.
        share = 1 / math.prod(shape[2:])
        h = x.sum((_IMAGE if alone else _SPACE)[len(shape)], dtype=_WIDE.get(x.dtype))
        h = _finite(h) if hidden is None else _affine(_finite(h), hidden, offset, share).relu()
        return _affine(h, weight, bias, share if hidden is None else 1.0).sigmoid().view(shape[0], -1)


@dataclass(frozen=True)
class Part:
    """A layer's part in the router of its block.

    Attributes:
        first: Where its coefficients begin among those of the block.
        count: How many it has.
        router: Predicts all of them from this layer's input; None for a layer that reads another's.
        handover: What the layers of a block share; None for a layer on its own.
        reader: This layer's place in the handover; None for the layer that writes.
    """

    first: int
    count: int
    router: BlockRouter | None
    handover: Handover | None
    reader: int | None


def parts_of(rows: Sequence[tuple[Tensor, Tensor]], hidden: nn.Linear | None) -> list[Part]:
    """One router for layers that were built together: it is the first one's, and the others read from it.

    Args:
        rows: Per layer, weight [rows, features] and bias [rows] of its coefficients.
        hidden: What turns the first one's squeezed input into features, followed by a ReLU; None for nothing.
    """
    weights, biases = zip(*rows, strict=True)
    first = None if hidden is None else (hidden.weight, hidden.bias)
    router = BlockRouter(torch.cat(weights), torch.cat(biases), first)
    handover = Handover(len(rows) - 1) if len(rows) > 1 else None
    counts = [len(bias) for bias in biases]
    return [
        Part(start, count, None if i else router, handover, i - 1 if i else None)
        for i, (start, count) in enumerate(zip(accumulate(counts, initial=0), counts, strict=False))
    ]


class ShippedConv(DynamicConv):
    """A convolution with one kernel per image, as it is shipped.

    A subclass has ``bias`` and says how a kernel comes about (:meth:`mixed`) and what a batch is convolved by
    (:meth:`many`).

    Args:
        spec: Its shapes.
        bias: [out], or None.
        part: Its part in the router of its block.
        method: Name of the method, for people.
    """

    bias: nn.Parameter | None
    _kernel: Tensor | None

    def __init__(self, spec: ConvSpec, bias: Tensor | None, part: Part, method: str) -> None:
        super().__init__(spec)
        self.add_module("router", part.router)
        self.handover, self.reader = part.handover, part.reader
        self.first, self.count = part.first, part.count
        self.method = method  # type: ignore[misc]
        self.register_parameter("bias", None if bias is None else _constant(bias))
        # Asked once, since a spec computes its answers.
        self._weight_shape, self._pads, self._dims = spec.weight_shape, spec.even_pads, spec.ndim + 2
        self._pointwise = spec.is_pointwise and bias is not None
        self._reuse, self._kernel = False, None

    def coefficients(self, x: Tensor) -> Tensor:
        """Of this layer, [B, count], of x or of the input of its block."""
        router, handover = self._modules["router"], self.handover
        if router is not None:
            eta: Tensor = router.forward(x)
            if handover is None:
                return eta
            handover.put(eta)
        else:
            assert handover is not None and self.reader is not None
            eta = handover.take(self.reader, x)
        return eta.narrow(1, self.first, self.count)

    def mixed(self, x: Tensor, alone: bool) -> tuple[Tensor | None, Tensor]:
        """The kernel of the only image of a batch, or None where there are more, and all coefficients."""
        raise NotImplementedError(f"{type(self).__name__} must implement mixed")

    def many(self, x: Tensor, eta: Tensor) -> Tensor:
        """The output, where `mixed` gave no kernel."""
        raise NotImplementedError(f"{type(self).__name__} must implement many")

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        shape = x.shape
        if len(shape) != self._dims or shape[1] != self.in_channels:
            self.check_input(x)
        alone, kernel = shape[0] == 1, self._kernel
        if kernel is None:
            if self._reuse and not alone:
                raise DynCompressError(
                    f"reuse_kernels met a batch of {x.shape[0]} first; the kernels that are reused are those of one"
                    " image: run the network on a batch of 1 before the others"
                )
            if autocasts(x):
                with torch.autocast(x.device.type, enabled=False):
                    kernel, eta = self.mixed(x, alone)
            else:
                kernel, eta = self.mixed(x, alone)
            if kernel is None:
                return self.many(x, eta)
            if self._reuse:
                self._kernel = kernel
        bias = self._parameters["bias"]
        if self._pointwise and alone and not torch.compiler.is_compiling():  # runtimes fuse what follows convolutions
            assert bias is not None
            out = torch.baddbmm(bias.view(1, -1, 1), kernel.view(1, -1, shape[1]), x.flatten(2))
            return out.view(1, -1, *shape[2:])
        if self._pads is None:
            return convolve(x, kernel, bias, self.spec, self.groups)
        return CONV[self._dims - 2](x, kernel, bias, self.stride, self._pads, self.dilation, self.groups)


class MixedConv(ShippedConv):
    """A convolution that mixes its kernels from a bank.

    Args:
        spec: Its shapes.
        bank: [out, g, in / groups, *kernel].
        bias: [out], or None.
        part: Its part in the router of its block: out * g coefficients, in the order of `arranged`.
        method: Name of the method, for people.
    """

    def __init__(self, spec: ConvSpec, bank: Tensor, bias: Tensor | None, part: Part, method: str) -> None:
        super().__init__(spec, bias, part, method)
        self.by_product = is_product(bank)
        stacked = bank.detach().flatten(2).transpose(0, 1).clone(memory_format=torch.contiguous_format)
        self.bank = nn.Parameter(stacked.transpose(0, 1) if self.by_product else stacked, requires_grad=False)
        self.g = bank.shape[1]

    def mixed(self, x: Tensor, alone: bool) -> tuple[Tensor | None, Tensor]:
        """See :meth:`ShippedConv.mixed`; coefficients [B, out * g]."""
        eta = self.coefficients(x)
        return self._mix(eta) if alone else None, eta

    def many(self, x: Tensor, eta: Tensor) -> Tensor:
        """See :meth:`ShippedConv.many`."""
        return dynamic_conv(x, *self._as_trained(eta), self.bias, self.spec)

    def _mix(self, eta: Tensor) -> Tensor:
        """The kernel [out, in / groups, *kernel] of one image; eta [1, out * g]."""
        bank = self._parameters["bank"]
        assert bank is not None
        if eta.dtype != bank.dtype:
            eta = eta.to(bank.dtype)
        if self.by_product:
            return torch.bmm(eta.view(-1, 1, self.g), bank).view(self._weight_shape)
        return (bank * eta.view(self.g, -1, 1)).sum(0).view(self._weight_shape)

    def _as_trained(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Bank [out, g, in / groups, *kernel] and coefficients [B, out, g]."""
        bank = (self.bank if self.by_product else self.bank.transpose(0, 1)).unflatten(2, self._weight_shape[1:])
        return bank, eta.unflatten(1, (-1, self.g)) if self.by_product else eta.unflatten(1, (self.g, -1)).mT

    def extra_repr(self) -> str:
        """Method, shapes and g."""
        return f"{super().extra_repr()}, g={self.g}, as shipped"


class ScaledConv(ShippedConv):
    """A convolution whose channels, in and out, are scaled per image: y = f * (W conv (c * x)) + bias.

    With [c, f] = 2 sigmoid of what the router says; the factors of 2 are part of the kernel. One image's kernel takes
    them all in where it is smaller than the maps.

    Args:
        spec: Its shapes.
        kernel: W [out, in / groups, *kernel].
        bias: [out], or None.
        filters: Whether there is an f.
        part: Its part in the router of its block: in + out sigmoids, or in.
        method: Name of the method, for people.
    """

    def __init__(
        self, spec: ConvSpec, kernel: Tensor, bias: Tensor | None, filters: bool, part: Part, method: str
    ) -> None:
        super().__init__(spec, bias, part, method)
        # [groups, out / groups, in / groups, *kernel], so that the scales of both sides meet it.
        self.bank = _constant(kernel.unflatten(0, (self.groups, -1)) * (4 if filters else 2))
        self.filters = filters
        ones = (1,) * spec.ndim
        self._ins, self._outs = (self.groups, 1, -1, *ones), (self.groups, -1, 1, *ones)

    def mixed(self, x: Tensor, alone: bool) -> tuple[Tensor | None, Tensor]:
        """See :meth:`ShippedConv.mixed`; sigmoids [B, in + out]."""
        eta, bank = self.coefficients(x), self._parameters["bank"]
        assert bank is not None
        if not alone or (bank.numel() > x.numel() and not self._reuse):
            return None, eta
        if eta.dtype != bank.dtype:
            eta = eta.to(bank.dtype)
        scale = eta.narrow(1, 0, self.in_channels).view(self._ins)
        if self.filters:
            scale = eta.narrow(1, self.in_channels, self.out_channels).view(self._outs) * scale
        return (bank * scale).view(self._weight_shape), eta

    def many(self, x: Tensor, eta: Tensor) -> Tensor:
        """See :meth:`ShippedConv.many`."""
        x = x * per_channel(eta[:, : self.in_channels], x)
        kernel = self.bank.view(self._weight_shape)
        if not self.filters:
            return convolve(x, kernel, self.bias, self.spec, self.groups)
        out = convolve(x, kernel, None, self.spec, self.groups)
        scale = per_channel(eta[:, self.in_channels :], out)
        return out * scale if self.bias is None else torch.addcmul(per_channel(self.bias, out), out, scale)

    def extra_repr(self) -> str:
        """Method, shapes, and what is scaled."""
        return f"{super().extra_repr()}, attention to channels{', filters' if self.filters else ''}, as shipped"


def is_product(bank: Tensor) -> bool:
    """Whether a bank [out, g, ...] is mixed by matrix products, or else by elementwise arithmetic."""
    return bank[0].numel() >= _SMALL_PRODUCT


def arranged(rows: Tensor, bank: Tensor) -> Tensor:
    """Rows of a router, [out * g, ...] channel by channel, in the order in which the bank is mixed.

    Elementwise arithmetic goes kernel by kernel, products channel by channel.
    """
    return rows if is_product(bank) else rows.unflatten(0, bank.shape[:2]).transpose(0, 1).flatten(0, 1)


@contextmanager
def reuse_kernels(net: nn.Module) -> Iterator[None]:
    """Within the context the kernels of the first image serve all that follow: the speed of a static network.

    For images that change slowly, such as the frames of a video: enter it anew for every n-th of them. What follows may
    come in batches.

    Args:
        net: What `fold` returned. It is not to be run by several threads meanwhile.

    Raises:
        DynCompressError: If the network has no folded dynamic convolution, or the first batch more than one image.
    """
    layers = [m for m in net.modules() if isinstance(m, ShippedConv)]
    if not layers:
        raise DynCompressError(
            f"{type(net).__name__} has no folded dynamic convolution, whose kernels could be reused; fold the student"
            " first: folded = dyncompress.fold(student)"
        )
    try:
        for layer in layers:
            layer._reuse = True
        yield
    finally:
        for layer in layers:
            layer._reuse, layer._kernel = False, None


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _finite(h: Tensor) -> Tensor:
    """What `Squeeze` does with what is not finite, in as few calls (and nodes of an exported graph) as it takes."""
    if torch.compiler.is_compiling():
        return torch.where(h.isnan(), 0.0, h).clamp(-LIMIT, LIMIT)
    return h.nan_to_num(0.0, LIMIT, -LIMIT)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, share: float) -> Tensor:
    """The affine map of a mean, given the sum: share * x W^T + b."""
    assert weight is not None and bias is not None
    if weight.dtype != x.dtype:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.ndim == 1:
        return torch.addmv(bias, weight, x, alpha=share)
    return torch.addmm(bias, x, weight.t(), alpha=share)
