"""A temperature that falls during training, and is part of the state dict."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.layers.options import check_part, is_number

__all__ = ["Temperature", "check_annealing", "remaining"]


def remaining(progress: float, warmup: float) -> float:
    """What is left of a warm-up: falls linearly from 1, where training starts, to 0, from ``warmup`` on.

    Args:
        progress: The part of the training that is over, from 0 to 1.
        warmup: The part of the training that it lasts, from 0, for none, to 1.

    Example:
        >>> [remaining(progress, 0.5) for progress in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.5, 0.0, 0.0]
    """
    return 1 - progress / warmup if progress < warmup else 0.0


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
        self.value.clamp_(max=1 + (self.start - 1) * remaining(progress, self.warmup))

    def extra_repr(self) -> str:
        """Where it begins, and until when it falls."""
        return f"{self.start:g} -> 1 within {self.warmup:.0%} of the training"


def check_annealing(temperature: object, warmup: object) -> None:
    """Raise unless the options are a temperature to start at and a part of a training."""
    if not is_number(temperature) or not 1 <= temperature < math.inf:
        raise DynCompressError(
            f"temperature {shown(temperature)} is nothing to start at: give a number of at least 1 (1 for none)"
        )
    check_part("warmup", warmup, "a training", "0 to 1, such as 0.1")
