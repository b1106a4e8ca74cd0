"""Mixing the kernels of a bank, one kernel per image and output channel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["assemble", "autocasts", "full_precision"]


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on, on the device of ``x``."""
    try:
        return torch.is_autocast_enabled(x.device.type)
    except RuntimeError:  # a device that knows no autocast, such as "meta"
        return False


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of ``x``, for coefficients and for mixing kernels."""
    # No context where none is needed: it would clutter exported graphs.
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def assemble(bank: Tensor, eta: Tensor) -> Tensor:
    """Kernels of each image: kernels[b, t] = sum_i eta[b, t, i] * bank[t, i].

    One batched matrix product, so that torch's FLOP counter sees its g * P multiply-adds per image.

    Args:
        bank: [out, g, in / groups, *kernel].
        eta: [B, out, g], any floating dtype.

    Returns:
        [B, out, in / groups, *kernel] in the dtype of the bank.
    """
    with full_precision(bank):
        mixed = torch.bmm(eta.to(bank.dtype).transpose(0, 1), bank.flatten(2))
    return mixed.transpose(0, 1).reshape(eta.shape[0], bank.shape[0], *bank.shape[2:])
