"""A dynamic convolution as it is shipped: nothing left in it that only training needs.

The same numbers as the layers that it is made of, by fewer and cheaper calls:

* The rows of a block's router are one matrix: one product and one sigmoid per block, not per layer.
* The bank lies in memory as [g, out, ...], so that mixing reads g long streams (one CPU thread, 256 channels, 3x3,
  g = 4: half the time of [out, g, ...], which training keeps for the sake of its gradients).
* A pointwise convolution of one image is one matrix product that adds the bias, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError
from dyncompress.layers.execution import convolve, dynamic_conv
from dyncompress.layers.method import DynamicConv
from dyncompress.layers.mixing import full_precision
from dyncompress.layers.router import LIMIT, Handover
from dyncompress.layers.spec import ConvSpec

__all__ = ["BlockRouter", "ShippedConv", "reuse_kernels"]

# torch multiplies matrices with fewer products than this in a plain loop, ten times slower than elementwise arithmetic.
_SMALL_PRODUCT = 400


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

    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, channels, *size] -> coefficients [B, rows]."""
        with full_precision(x):
            dtype = torch.promote_types(x.dtype, torch.float32)
            # A mean is a sum and a slow division; the product with the weights divides as well.
            h = x.sum(dim=tuple(range(2, x.ndim)), dtype=dtype).nan_to_num(0.0, LIMIT, -LIMIT)  # as in Squeeze
            share = 1 / math.prod(x.shape[2:])
            if self.hidden_weight is not None:
                h, share = _affine(h, self.hidden_weight, self.hidden_bias, share).relu(), 1.0
            return _affine(h, self.weight, self.bias, share).sigmoid()


class ShippedConv(DynamicConv):
    """A convolution that mixes its kernels from a bank [g, out, in / groups, *kernel].

    Args:
        spec: Its shapes.
        bank: [out, g, in / groups, *kernel].
        bias: [out], or None.
        rows: First and last + 1 of the block's coefficients that are this layer's; it has g of each output channel,
            those of one kernel after the other.
        router: Predicts the block's coefficients from this layer's input; None for a layer that reads another's.
        handover: What the layers of a block share; None for a layer on its own.
        reader: This layer's place in the handover; None for the layer that writes.
        method: Name of the method, for people.
    """

    def __init__(
        self,
        spec: ConvSpec,
        bank: Tensor,
        bias: Tensor | None,
        rows: tuple[int, int],
        router: BlockRouter | None,
        handover: Handover | None,
        reader: int | None,
        method: str,
    ) -> None:
        super().__init__(spec)
        self.method = method  # type: ignore[misc]
        self.bank = _constant(bank.transpose(0, 1).contiguous())
        self.register_parameter("bias", None if bias is None else _constant(bias))
        self.rows, self.router, self.handover, self.reader = rows, router, handover, reader
        self._by_product = bank[0].numel() >= _SMALL_PRODUCT
        self._by_conv = not spec.is_pointwise or bias is None  # asked once: a spec computes its answers
        self._reuse, self._kernel = False, None

    bias: nn.Parameter | None
    _kernel: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        kernel = self._kernel
        if kernel is None:
            eta = self._coefficients(x)
            if x.shape[0] != 1 or torch.compiler.is_compiling():
                if self._reuse:
                    raise DynCompressError(
                        f"reuse_kernels met a batch of {x.shape[0]} first; the kernels that are reused are those of one"
                        " image: run the network on a batch of 1 before the others"
                    )
                eta = eta.reshape(-1, *self.bank.shape[:2]).transpose(1, 2)
                return dynamic_conv(x, self.bank.transpose(0, 1), eta, self.bias, self.spec)
            kernel = self._mix(eta)
            if self._reuse:
                self._kernel = kernel
        if self._by_conv or x.shape[0] != 1:
            return convolve(x, kernel, self.bias, self.spec, self.spec.groups)
        assert self.bias is not None
        out = torch.baddbmm(self.bias.view(1, -1, 1), kernel.flatten(1).unsqueeze(0), x.flatten(2))
        return out.view(1, -1, *x.shape[2:])

    def _coefficients(self, x: Tensor) -> Tensor:
        """This layer's coefficients [B, g * out]."""
        if self.router is not None:
            eta: Tensor = self.router(x)
            if self.handover is not None:
                self.handover.put(eta)
        else:
            assert self.handover is not None and self.reader is not None
            eta = self.handover.take(self.reader, x)
        return eta[:, self.rows[0] : self.rows[1]]

    def _mix(self, eta: Tensor) -> Tensor:
        """The kernel [out, in / groups, *kernel] of one image; eta [1, g * out]."""
        g, out = self.bank.shape[:2]
        eta = eta.to(self.bank.dtype)
        with full_precision(eta):
            if self._by_product:
                mixed = torch.bmm(eta.view(g, out, 1).permute(1, 2, 0), self.bank.flatten(2).transpose(0, 1))
                return mixed.view(self.bank.shape[1:])
            return (self.bank * eta.view(g, out, *(1,) * (self.bank.ndim - 2))).sum(0)

    def extra_repr(self) -> str:
        """Method, shapes and g."""
        return f"{super().extra_repr()}, g={self.bank.shape[0]}, as shipped"


@contextmanager
def reuse_kernels(net: nn.Module) -> Iterator[None]:
    """Within the context the kernels of the first image serve all that follow: the speed of a static network.

    For images that change slowly, such as the frames of a video: enter it anew for every n-th of them.

    Args:
        net: What `fold` returned. It is not to be run by several threads meanwhile.

    Raises:
        DynCompressError: If the network has no folded dynamic convolution.
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


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, share: float) -> Tensor:
    """The affine map of a mean, given the sum: share * x W^T + b."""
    assert bias is not None
    return torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).t(), alpha=share)
