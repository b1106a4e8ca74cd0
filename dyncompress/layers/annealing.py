"""A temperature that falls during training, and is part of the state dict."""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError, shown

__all__ = ["Temperature", "check_annealing"]


class Temperature(nn.Module):
    """Divides logits by a temperature, which :meth:`anneal` lowers from ``start`` to 1.

    It is a buffer: a checkpoint from the middle of the annealing is the same function again once it is loaded. It only
    falls: a second training leaves it where the first one brought it. A layer that nobody anneals stays at ``start``.

    Args:
        start: Temperature at the beginning of training, at least 1.
        warmup: Part of the training until it is 1, 0 to 1.

    Example:
        >>> temperature = Temperature(start=30.0, warmup=0.1)
        >>> for progress in (0.0, 0.05, 0.1, 1.0):
        ...     temperature.anneal(progress)
        ...     print(temperature(torch.tensor(62.0)).item())
        2.0666...
        4.0
        62.0
        62.0
    """

    value: Tensor

    def __init__(self, start: float, warmup: float) -> None:
        super().__init__()
        self.start, self.warmup = start, warmup
        self.register_buffer("value", torch.tensor(float(start)))

    def forward(self, logits: Tensor) -> Tensor:
        """Logits of any shape, in fp32 at least -> the same, divided."""
        return logits / self.value.to(logits.dtype)

    def anneal(self, progress: float) -> None:
        """Linear in the progress: start at 0, 1 from ``warmup`` on; never up."""
        rest = 1 - progress / self.warmup if progress < self.warmup else 0.0
        self.value.clamp_(max=1 + (self.start - 1) * rest)

    def extra_repr(self) -> str:
        """Where it begins, and until when it falls."""
        return f"{self.start:g} -> 1 within {self.warmup:.0%} of the training"


def check_annealing(temperature: object, warmup: object) -> None:
    """Raise unless the options are a temperature to start at and a part of a training."""
    if not _is_number(temperature) or not 1 <= temperature < math.inf:
        raise DynCompressError(
            f"temperature {shown(temperature)} is nothing to start at: give a number of at least 1 (1 for none)"
        )
    if not _is_number(warmup) or not 0 <= warmup <= 1:
        raise DynCompressError(f"warmup {shown(warmup)} is no part of a training: give 0 to 1, such as 0.1")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
