"""A linear layer as what it is over the tokens of an image: a pointwise convolution."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["TokenConv"]


class TokenConv(nn.Module):
    """Takes the place of an ``nn.Linear``: x [B, ..., in] -> [B, ..., out].

    The first dimension is the batch; those between it and the last are the positions of the convolution.

    Args:
        conv: Takes [B, in, positions] and returns [B, out, positions].
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ..., in] -> [B, ..., out], contiguous as a linear layer's result is."""
        tokens = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
        out: Tensor = self.conv(tokens.mT).mT
        return out.reshape(*x.shape[:-1], out.shape[-1]).contiguous()
