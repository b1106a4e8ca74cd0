"""Kernels that a whole layer mixes with the same few coefficients: what CondConv, DY-CNN and ODConv have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dyncompress.layers.channels import scaled
from dyncompress.layers.method import DynamicConv
from dyncompress.layers.options import check_count
from dyncompress.layers.router import RouterLinear
from dyncompress.layers.spec import ConvSpec
from dyncompress.layers.warmstart import atoms

__all__ = ["SharedBank", "check_kernels"]

_MOST_KERNELS = 1024  # a bank of more is a slip of the pen


def check_kernels(option: str, count: object, least: str) -> None:
    """Raise unless an option is a number of kernels."""
    check_count(option, count, "kernels", 1, _MOST_KERNELS, f"{least} to {_MOST_KERNELS}")


class SharedBank(DynamicConv):
    """A bank of K kernels, and a bias that is not mixed.

    A subclass adds ``router``, whose logits of 0 make every coefficient ``share``, and calls :meth:`reset_parameters`.

    Args:
        spec: Shapes of the convolution.
        kernels: K.
        share: What every coefficient is where training starts.
        taps: Whether positions within the kernel have coefficients of their own.
    """

    bias: nn.Parameter | None
    router: RouterLinear

    def __init__(self, spec: ConvSpec, kernels: int, share: float, taps: bool = False) -> None:
        super().__init__(spec)
        self.share, self.taps = share, taps
        rows, kernel = (math.prod(spec.kernel_size), (1,) * spec.ndim) if taps else (1, spec.kernel_size)
        self.bank = nn.Parameter(torch.empty(rows, kernels, *spec.weight_shape[:2], *kernel))
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.out_channels)) if spec.bias else None)

    @property
    def kernels(self) -> int:
        """Number of kernels K."""
        return self.bank.shape[1]

    def reset_parameters(self) -> None:
        """Start from scratch: all coefficients ``share``, a mixed kernel with the variance of nn.ConvNd's default."""
        bound = 1 / math.sqrt(math.prod(self.spec.weight_shape[1:]))
        wider = bound / (self.share * math.sqrt(self.kernels))
        nn.init.uniform_(self.bank, -wider, wider)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self._neutralise()

    def _neutralise(self) -> None:
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def start(self, weight: Tensor, bias: Tensor, spare: Tensor | None, generator: torch.Generator | None) -> None:
        """All coefficients ``share``, and kernels whose mix then is the static one, no two of which are equal.

        With e_0 the static kernel, and e_i of the filters of a kernel i >= 1 the spare ones most similar to it, with
        a little noise (:func:`dyncompress.layers.warmstart.atoms`)::

            kernel[i] = (weight + e_i - mean(e)) / (share * K)

        See :meth:`DynamicConv.load_static` for arguments.
        """
        self._neutralise()
        weight = weight.to("cpu", torch.float64)  # not every device knows fp64
        others = atoms(weight, spare, self.kernels - 1, generator).transpose(0, 1)
        others = others - (weight + others.sum(0)) / self.kernels
        others = ((weight + others) / (self.share * self.kernels)).to(self.bank.dtype)
        # Computed from the others as they are stored, so that their rounding is made up for.
        first = weight / self.share - others.to(weight).sum(0)
        stack = torch.cat([first.unsqueeze(0), others.to(weight)])
        if self.taps:
            stack = stack.flatten(3).permute(3, 0, 1, 2)
        self.bank.copy_(stack.reshape(self.bank.shape))

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """See :meth:`DynamicConv.absorb`; output channels are the third dimension of the bank."""
        self.bank.data = scaled(self.bank.data, scale, dim=2)
        self.absorb_in_bias(scale, shift, self.bank.dtype)
        return True
