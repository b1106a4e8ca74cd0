"""Training without keeping the mixed kernels: backward mixes them again.

Autograd would keep the kernels of every image until backward, B * P floats per layer: 0.7 GB for a ResNet-18 of half
width and 64 images. Mixing them once more takes g multiply-adds per weight, a few percent of a training step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyncompress.layers.mixing import assemble, kernels_of, rows_of

__all__ = ["Shapes", "convolve_batch", "gradients"]


class Shapes(NamedTuple):
    """What a convolution needs besides tensors, after padding that is no plain zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pointwise: bool  # one matrix product per image
    chunk: int  # images whose kernels are there at the same time
    weight: tuple[int, ...] = ()  # (out, in / groups, *kernel), of a bank whose rows are no output channels


def convolve_batch(x: Tensor, bank: Tensor, eta: Tensor, shapes: Shapes) -> Tensor:
    """Each image convolved with its own mix of kernels, which backward mixes again.

    Args:
        x: [B, in, *size], in the precision of the convolution; B at least 1.
        bank: [out, g, in / groups, *kernel], or another of :mod:`dyncompress.layers.mixing`.
        eta: [B, out, g], or as the bank has rows.
        shapes: The rest of the convolution.

    Returns:
        [B, out, *size'].
    """
    out: Tensor = _Convolve.apply(x, bank, eta, shapes)  # type: ignore[no-untyped-call]
    return out


class _Convolve(torch.autograd.Function):
    """Forward keeps x, bank and eta."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bank: Tensor, eta: Tensor, shapes: Shapes) -> Tensor:
        parts = zip(x.split(shapes.chunk), eta.split(shapes.chunk), strict=True)
        return torch.cat([_forward(part, _kernels(bank, mix, shapes).to(x.dtype), shapes) for part, mix in parts])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Shapes], output: Tensor) -> None:
        *tensors, ctx.shapes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *of_out: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, bank, eta = ctx.saved_tensors
        return *gradients(of_out[0], x, bank, eta, ctx.shapes, ctx.needs_input_grad[0]), None


def gradients(
    of_out: Tensor, x: Tensor, bank: Tensor, eta: Tensor, shapes: Shapes, wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (None, unless wanted), bank and eta, given that of the output; itself made of ops that have some.

    d kernels[b, t] = sum_i eta[b, t, i] d bank[t, i]: summed over images for the bank, over weights for eta.
    """
    of_x, of_eta, of_bank = [], [], torch.zeros_like(bank)
    parts = zip(*(t.split(shapes.chunk) for t in (of_out, x, eta)), strict=True)
    for gradient, part, mix in parts:
        kernels = _kernels(bank, mix, shapes).to(x.dtype)
        for_x, for_kernels = _backward(gradient, part, kernels, shapes, wanted)
        of_x.append(for_x)
        rows = rows_of(for_kernels.to(bank.dtype), bank)
        of_bank = of_bank + torch.bmm(mix.to(bank.dtype).permute(1, 2, 0), rows).reshape(bank.shape)
        of_eta.append(torch.bmm(rows, bank.flatten(2).transpose(1, 2)).transpose(0, 1).to(eta.dtype))
    return torch.cat(of_x) if wanted else None, of_bank, torch.cat(of_eta)


def _kernels(bank: Tensor, eta: Tensor, shapes: Shapes) -> Tensor:
    return kernels_of(bank, eta, shapes.weight) if shapes.weight else assemble(bank, eta)


def _forward(x: Tensor, kernels: Tensor, shapes: Shapes) -> Tensor:
    if shapes.pointwise:
        return torch.bmm(kernels.flatten(2), x.flatten(2)).reshape(len(x), -1, *x.shape[2:])
    image, weight = _as_groups(x, kernels)
    out = torch.convolution(
        image, weight, None, shapes.stride, shapes.padding, shapes.dilation, False,
        [0] * len(shapes.stride), shapes.groups * len(x),
    )  # fmt: skip
    return out.reshape(len(x), kernels.shape[1], *out.shape[2:])


def _backward(gradient: Tensor, x: Tensor, kernels: Tensor, shapes: Shapes, wanted: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (any tensor, unless wanted) and of the kernels."""
    if shapes.pointwise:
        rows = gradient.flatten(2)
        of_kernels = torch.bmm(rows, x.flatten(2).transpose(1, 2)).reshape(kernels.shape)
        of_x = torch.bmm(kernels.flatten(2).transpose(1, 2), rows).reshape(x.shape) if wanted else x
        return of_x, of_kernels
    image, weight = _as_groups(x, kernels)
    of_x, of_kernels, _ = torch.ops.aten.convolution_backward(
        gradient.reshape(1, -1, *gradient.shape[2:]), image, weight, None, shapes.stride, shapes.padding,
        shapes.dilation, False, [0] * len(shapes.stride), shapes.groups * len(x), [wanted, True, False],
    )  # fmt: skip
    return of_x.reshape(x.shape) if wanted else x, of_kernels.reshape(kernels.shape)


def _as_groups(x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """The batch as groups of one convolution."""
    return x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1)
