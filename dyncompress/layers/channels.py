"""Numbers that belong to channels, brought into the shape of what they are applied to."""

from __future__ import annotations

from torch import Tensor

__all__ = ["per_channel", "scaled"]


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Values of channels, [C] or [B, C], as [C, 1, ...] or [B, C, 1, ...] to go with images [B, C, *size].

    In the dtype of the images, too.
    """
    return values.to(like.dtype).reshape(*values.shape, *(1,) * (like.ndim - 2))


def scaled(weight: Tensor, scale: Tensor, dim: int = 0) -> Tensor:
    """A weight with output channels [out] along one dimension, each times its scale [out]; in the weight's dtype."""
    return (weight * scale.reshape(-1, *(1,) * (weight.ndim - dim - 1))).to(weight.dtype)
