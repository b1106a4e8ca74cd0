"""Mixing the kernels of a bank: sums of its kernels, weighted for each image.

Coefficients belong to the rows of a bank, and there are three kinds of rows:

======== ======================================== ============== =========================================
bank     shape                                    eta            one row is
======== ======================================== ============== =========================================
own      [out, g, in / groups, *kernel]           [B, out, g]    an output channel (DyNet)
shared   [1, K, out, in / groups, *kernel]        [B, 1, K]      the whole kernel (CondConv, DY-CNN)
taps     [taps, K, out, in / groups, 1, ...]      [B, taps, K]   a position within the kernel (ODConv)
======== ======================================== ============== =========================================
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["as_own", "assemble", "autocasts", "full_precision", "is_own", "kernels_of", "rows_of"]


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on, on the device of ``x``, and does not leave x alone, as it does with fp64."""
    try:
        return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
    except RuntimeError:  # a device that knows no autocast, such as "meta"
        return False


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of ``x``, for coefficients and for mixing kernels."""
    # No context where none is needed: it would clutter exported graphs.
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def assemble(bank: Tensor, eta: Tensor) -> Tensor:
    """The mix of each image, row by row: mixed[b, t] = sum_i eta[b, t, i] * bank[t, i].

    One batched matrix product, so that torch's FLOP counter sees its g * P multiply-adds per image.

    Args:
        bank: [rows, g, ...].
        eta: [B, rows, g], any floating dtype.

    Returns:
        [B, rows, ...] in the dtype of the bank.
    """
    with full_precision(bank):
        mixed = torch.bmm(eta.to(bank.dtype).transpose(0, 1), bank.flatten(2))
    return mixed.transpose(0, 1).reshape(eta.shape[0], bank.shape[0], *bank.shape[2:])


def is_own(bank: Tensor, weight_shape: Sequence[int]) -> bool:
    """Whether each output channel has coefficients of its own."""
    return bank.ndim == len(weight_shape) + 1


def kernels_of(bank: Tensor, eta: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The kernels of each image, whatever the rows of the bank are.

    Args:
        bank: In one of the three shapes above.
        eta: [B, rows, g].
        weight_shape: (out, in / groups, *kernel).

    Returns:
        [B, out, in / groups, *kernel].

    Example:
        >>> bank = torch.tensor([[1.0], [10.0]]).reshape(2, 1, 1, 1, 1)  # two taps of a kernel of 2, one such kernel
        >>> kernels_of(bank, torch.tensor([[[3.0], [0.5]]]), (1, 1, 2)).tolist()
        [[[[3.0, 5.0]]]]
    """
    mixed = assemble(bank, eta)
    if is_own(bank, weight_shape):
        return mixed
    return mixed.flatten(2).transpose(1, 2).reshape(eta.shape[0], *weight_shape)


def rows_of(kernels: Tensor, bank: Tensor) -> Tensor:
    """Kernels [B, out, in / groups, *kernel] row by row, as they were mixed: [rows, B, weights of a row]."""
    if is_own(bank, kernels.shape[1:]):
        return kernels.flatten(2).transpose(0, 1)
    return kernels.reshape(kernels.shape[0], -1, bank.shape[0]).permute(2, 0, 1)


def as_own(bank: Tensor, eta: Tensor, weight_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same mixes by coefficients of output channels, for what cannot do without: larger, and equal in its results.

    A tap becomes a kernel that is zero elsewhere.

    Args:
        bank: In one of the three shapes above.
        eta: [B, rows, g].
        weight_shape: (out, in / groups, *kernel).

    Returns:
        Bank [out, rows * g, in / groups, *kernel] and coefficients [B, out, rows * g].
    """
    if is_own(bank, weight_shape):
        return bank, eta
    rows, count = bank.shape[:2]
    if rows == 1:
        own = bank[0].transpose(0, 1)
    else:
        taps = bank.reshape(rows, count, *weight_shape[:2]).permute(2, 1, 3, 0)
        own = torch.diag_embed(taps).transpose(2, 3).reshape(weight_shape[0], count * rows, *weight_shape[1:])
    return own, eta.transpose(1, 2).flatten(1).unsqueeze(1).expand(-1, weight_shape[0], -1)
