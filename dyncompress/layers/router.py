"""Predicting coefficients from a layer's input, and handing that input on to the other layers of a block."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError
from dyncompress.layers.mixing import full_precision

__all__ = ["LIMIT", "Handover", "RouterLinear", "Squeeze", "squeezed"]

LIMIT = 1e18  # of a feature: two linear layers of any sensible width and weight stay below 1e38


class RouterLinear(nn.Linear):
    """A linear layer that computes in fp32 at least, whatever its parameters' dtype and autocast say.

    Where training holds dynamics back, ``share`` is a number from 0 to 1, and the layer W (share * h) + b: at 0 its
    output does not depend on the input. It is a buffer, so that a checkpoint computes what was trained; a layer that is
    not held back has none.
    """

    share: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("share", None)

    def forward(self, input: Tensor) -> Tensor:
        """Input [B, in] -> [B, out]."""
        with full_precision(input):
            if self.share is not None:
                input = input * self.share.to(input.dtype)
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, self.weight.to(input.dtype), bias)

    def hold(self) -> None:
        """Depend on the input not at all, until `release`."""
        if self.share is None:  # a buffer that is there already may be known to others
            self.share = self.weight.new_zeros((), dtype=torch.float32)
        self.share.zero_()

    def release(self, share: float) -> None:
        """Depend on the input so much, if it is held back; never less than before."""
        if self.share is not None:
            self.share.clamp_(min=share)

    @torch.no_grad()
    def settle(self) -> None:
        """The same function without a share: it becomes part of the weight."""
        if self.share is not None:
            self.weight.mul_(self.share)
            self.share = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint says whether the layer was held back; one that says nothing is of one that was not.
        found = state_dict.get(f"{prefix}share")
        if found is None:
            if self.share is not None and f"{prefix}weight" in state_dict:
                self.share.fill_(1.0)
                state_dict = {**state_dict, f"{prefix}share": self.share}
        elif self.share is None:
            self.share = torch.ones_like(found, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Squeeze(nn.Module):
    """One vector per image: the mean over all positions, through a ReLU layer if ``hidden``.

    Args:
        channels: Channels of the input.
        hidden: Width of the ReLU layer; 0 for none.
    """

    def __init__(self, channels: int, hidden: int = 0) -> None:
        super().__init__()
        self.reduce = RouterLinear(channels, hidden) if hidden else None

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, channels, *size] -> [B, hidden or channels] in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean = x.mean(dim=tuple(range(2, x.ndim)), dtype=dtype)
        # A sum that overflows, or a broken pixel, would break the kernel and with it the whole image; a static
        # convolution breaks only what it touches. In a sigmoid nothing above the limit counts.
        mean = mean.nan_to_num(0.0, LIMIT, -LIMIT)
        return mean if self.reduce is None else F.relu(self.reduce(mean))


class Handover:
    """Hands a block's squeezed input from its first layer to the others, within one forward pass.

    A plain object that the layers share by reference. Each reader takes its entry away, so that no autograd graph
    outlives its step. Threads that run one network at the same time do not see each other's entries. Copies and
    pickles carry no tensors; the layers of a copied block share the copied object.

    Args:
        readers: How many layers read what the first one writes.
    """

    def __init__(self, readers: int) -> None:
        self._readers = readers
        self._waiting: dict[tuple[int, int], Tensor] = {}

    def put(self, description: Tensor) -> None:
        """Leave a [B, features] tensor for every reader."""
        for reader in range(self._readers):
            self._waiting[_thread(), reader] = description

    def take(self, reader: int, x: Tensor) -> Tensor:
        """What was left for a reader whose input is ``x`` [B, ...]; it is gone afterwards.

        Raises:
            DynCompressError: If nothing waits, or it is of another batch or device.
        """
        description = self._waiting.pop((_thread(), reader), None)
        if description is None:  # a compiled first layer before one that is not
            description = self._waiting.pop((_COMPILED, reader), None)
        if description is None:
            raise DynCompressError(
                "no coefficients wait for this layer: the first layer of its block, which owns the router, must run "
                "before it, once for each run of it; convert with router='layer' where layers are skipped, repeated, "
                "reordered, or checkpointed or compiled one by one"
            )
        if description.shape[0] != x.shape[0] or description.device != x.device:
            raise DynCompressError(
                f"the router of this block saw a batch of {description.shape[0]} on {description.device}, "
                f"this layer {x.shape[0]} on {x.device}; both must agree: convert with router='layer'"
            )
        return description

    def __getstate__(self) -> dict[str, Any]:
        return {"_readers": self._readers, "_waiting": {}}


def squeezed(x: Tensor, squeeze: Squeeze | None, handover: Handover | None, reader: int | None) -> Tensor:
    """What a layer's router reads: its own input, handed on to the others of its block, or what they were left.

    Args:
        x: The layer's input, [B, in, *size].
        squeeze: Of the layer that owns it; None for one that reads another's.
        handover: What the layers of a block share; None for a layer on its own.
        reader: The layer's place in the handover; None for the owner.

    Returns:
        [B, features].
    """
    if squeeze is None:
        assert handover is not None and reader is not None
        return handover.take(reader, x)
    features: Tensor = squeeze(x)
    if handover is not None:
        handover.put(features)
    return features


_COMPILED = 0  # no thread's number; within a graph nothing is shared between threads


def _thread() -> int:
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()
