"""Convolving each image with a kernel of its own, however the method came by it."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncompress.layers.execution import convolve
from dyncompress.layers.spec import ConvSpec

__all__ = ["convolve_each"]


def convolve_each(x: Tensor, kernels: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """Each image with its kernel: one convolution whose groups are the images, or one matrix product where 1x1.

    Args:
        x: [B, in, *size].
        kernels: [B, out, in / groups, *kernel].
        bias: [out], or None.
        spec: Shapes, padding and groups.

    Returns:
        [B, out, *size'].
    """
    batch = x.shape[0]
    if spec.is_pointwise and (torch.compiler.is_compiling() or batch != 1):
        out = torch.bmm(kernels.flatten(2), x.flatten(2)).reshape(batch, spec.out_channels, *x.shape[2:])
        return out if bias is None else out + bias.to(out.dtype).reshape(-1, *(1,) * spec.ndim)
    if not torch.compiler.is_compiling() and batch < 2:  # a batch of none has no groups, and any kernel will do
        return convolve(x, kernels.sum(0), bias, spec, spec.groups)
    out = convolve(
        x.reshape(1, batch * spec.in_channels, *x.shape[2:]),
        kernels.flatten(0, 1),
        None if bias is None else bias.repeat(batch),
        spec,
        spec.groups * batch,
    )
    return out.reshape(batch, spec.out_channels, *out.shape[2:])
