"""How a per-sample convolution runs: one module's business, shared by all methods.

A convolution is linear in its kernel, so a mixed kernel can be applied in several exact ways (Zhang et al.,
DyNet, arXiv 2004.10694):

========== ============================================================ =====================================
strategy   what runs                                                    when
========== ============================================================ =====================================
single     one plain convolution                                        batch 1
bmm        one matrix product per image                                 1x1, stride 1, no padding, no groups
grouped    the batch as groups of one convolution                       otherwise
features   all kernels of the bank on every image, then the mix         two large kernels on small maps; batch 0
scan       a loop in the graph, one plain convolution per image         never by itself: for ONNX (:func:`run_as`)
fused      one Triton kernel, which mixes on the chip (GPUs only)       never by itself, until it's measured on one
========== ============================================================ =====================================

Kernels that are no such mix (:func:`convolve_each`) run as single, bmm, grouped or scan. For them features means a sum
of matrix products, one per position within the kernel: like theirs, a graph without loops, for any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dyncompress.layers.channels import per_channel
from dyncompress.layers.fused import fused_conv, unsupported
from dyncompress.layers.mixing import as_own, autocasts, is_own, kernels_of
from dyncompress.layers.recompute import Shapes, convolve_batch
from dyncompress.layers.spec import ConvSpec

__all__ = ["CONV", "Strategy", "choose", "convolve", "convolve_each", "dynamic_conv", "run_as"]

Strategy = Literal["single", "grouped", "bmm", "features", "scan", "fused"]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# Kernels of one chunk stay in the cache and reuse its memory: whole batches of them cost more in page faults than in
# arithmetic. With an allocator that keeps freed memory, chunks of this size cost nothing, either.
_CHUNK_BYTES, _CHUNK_IMAGES = 8 << 20, 8
# On a small map, preparing each image's kernel for a convolution costs more than the convolution: 2.3 to 6 times the
# static convolution's time in training, 64 images, 256 channels, 3x3 on 7x7 (two CPUs, one thread, two allocators). Two
# kernels on all images cost two static convolutions, wherever that is.
_LARGE_KERNEL_BYTES = 512 << 10
_SMALL_MAP = 100  # positions
_LARGE_BATCH = 16
_FEW_KERNELS = 2

_OF_KERNELS = ("grouped", "scan", "features")  # strategies to which kernels that are no mix of a bank can be forced
_forced: Strategy | None = None


def dynamic_conv(
    x: Tensor,
    bank: Tensor,
    eta: Tensor,
    bias: Tensor | None,
    spec: ConvSpec,
    strategy: Strategy | None = None,
) -> Tensor:
    """Convolve each image with its own mix of the bank's kernels.

    Args:
        x: [B, in, *size].
        bank: [out, g, in / groups, *kernel], or another of :mod:`dyncompress.layers.mixing`.
        eta: [B, out, g], the coefficients of each image, or as the bank has rows.
        bias: [out], added to every image alike, or None.
        spec: Shapes, padding and groups of the convolution.
        strategy: How to run it; by default chosen from the shapes. All give the same result.

    Returns:
        [B, out, *size'].
    """
    strategy = strategy or _forced or choose(x, bank, spec)
    if strategy == "fused":
        if is_own(bank, spec.weight_shape) and not unsupported(x, bank, spec):
            return _recomputing(strategy, x, bank, eta, bias, spec, x.shape[0])
        strategy = choose(x, bank, spec)
    if strategy == "features":
        return _features(x, *as_own(bank, eta, spec.weight_shape), bias, spec)
    # A chunk loop would fix the batch size of a traced graph, and the compiler plans memory itself.
    size = x.shape[0] if torch.compiler.is_compiling() else _chunk(bank)
    if x.shape[0] <= size or strategy not in ("grouped", "bmm"):
        return _run(strategy, x, kernels_of(bank, eta, spec.weight_shape), bias, spec)
    if x.device.type != "cpu":
        size = x.shape[0]  # one launch; what remains is to keep no kernels for backward
    if torch.is_grad_enabled() and (bank.requires_grad or eta.requires_grad):
        return _recomputing(strategy, x, bank, eta, bias, spec, size)
    chunks = zip(x.split(size), eta.split(size), strict=True)
    return torch.cat(
        [_run(strategy, part, kernels_of(bank, mix, spec.weight_shape), bias, spec) for part, mix in chunks]
    )


def convolve_each(
    x: Tensor,
    given: Tensor,
    make: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    bias: Tensor | None,
    spec: ConvSpec,
) -> Tensor:
    """Convolve each image with a kernel of its own, however the method comes by it.

    As in :func:`dynamic_conv`, the kernels of one chunk of images exist at a time, and backward makes them again. (All
    at once, and kept for backward, they are under torch.func's transforms and where a graph is traced.)

    Args:
        x: [B, in, *size].
        given: [B, ...], what the kernels are made from.
        make: From any part of ``given`` to the kernels [B', out, in / groups, *kernel] of these images, and what is
            added to their channels, [B', out] or None.
        bias: [out], added to every image alike, or None.
        spec: Shapes, padding and groups of the convolution.

    Returns:
        [B, out, *size'].
    """
    batch, traced, on_cpu = x.shape[0], torch.compiler.is_compiling(), x.device.type == "cpu"
    strategy: Strategy = _forced if _forced in _OF_KERNELS else "bmm" if spec.is_pointwise else "grouped"
    if batch < 2 and not traced:
        strategy = "single"

    def run(part: Tensor, made_from: Tensor) -> Tensor:
        kernels, biases = make(made_from)
        if strategy == "single":  # a batch of none has no kernel, and any will do
            kernels = kernels.sum(0, keepdim=True)
        out = _run(strategy, part, kernels, bias, spec)
        return out if biases is None else out + per_channel(biases, out)

    size = _images(spec.kernel_params * x.element_size()) if on_cpu else batch
    if traced or strategy in ("single", "scan") or (on_cpu and batch <= size):
        return run(x, given)
    chunks = zip(x.split(size), given.split(size), strict=True)
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return torch.cat([run(*chunk) for chunk in chunks])
    # Backward repeats it up to where the last tensor that it needs is there: the kernels, not the convolution.
    return torch.cat([checkpoint(run, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


@contextmanager
def run_as(strategy: Strategy) -> Iterator[None]:
    """Within the context every dynamic convolution of the process runs as told, as an export may need.

    ONNX fixes the number of groups, and with ``"grouped"`` the batch size. Two strategies leave it open: ``"scan"``
    (same work; a recent torch) and ``"features"`` (g times the work; any torch, any exporter).
    """
    global _forced
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


def choose(x: Tensor, bank: Tensor, spec: ConvSpec) -> Strategy:
    """The fastest strategy for an input x [B, in, *size] and a bank.

    While a graph is traced, one that holds for every batch size but 1 (a traced batch of 1 stays 1).
    """
    batch = x.shape[0]
    if batch == 1:
        return "single"
    if torch.compiler.is_compiling():
        return "bmm" if spec.is_pointwise else "grouped"
    if batch == 0:
        return "features"
    if spec.is_pointwise:
        return "bmm"
    kernels = bank.shape[1] if is_own(bank, spec.weight_shape) else bank.shape[0] * bank.shape[1]
    small = math.prod(spec.output_size(x.shape[2:])) <= _SMALL_MAP and kernels <= _FEW_KERNELS
    large = spec.kernel_params * bank.element_size() >= _LARGE_KERNEL_BYTES
    return "features" if small and large and batch >= _LARGE_BATCH else "grouped"


def _chunk(bank: Tensor) -> int:
    """Images whose assembled kernels fill one chunk."""
    return _images(bank.numel() * bank.element_size() // bank.shape[1])


def _images(kernel_bytes: int) -> int:
    return max(_CHUNK_IMAGES, _CHUNK_BYTES // kernel_bytes)


def _run(strategy: Strategy, x: Tensor, kernels: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    if strategy == "bmm" or (strategy == "scan" and spec.is_pointwise):  # a matrix product needs no loop
        return _pointwise(x, kernels, bias)
    if strategy == "scan":
        return _scan(x, kernels, bias, spec)
    if strategy == "single":
        return convolve(x, kernels.squeeze(0), bias, spec, spec.groups)
    if strategy == "features":
        return _by_taps(x, kernels, bias, spec)
    return _grouped(x, kernels, bias, spec)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, groups: int) -> Tensor:
    """A plain convolution with any padding; ``groups`` may be those of the spec times the batch."""
    x, padding = _padded(x, spec)
    return CONV[spec.ndim](x, weight, bias, spec.stride, padding, spec.dilation, groups)


def _padded(x: Tensor, spec: ConvSpec) -> tuple[Tensor, tuple[int, ...]]:
    """The input, and the zeros that its convolution is to add on both sides."""
    if spec.even_pads is not None:
        return x, spec.even_pads
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    return F.pad(x, [side for pair in reversed(spec.pads) for side in pair], mode=mode), (0,) * spec.ndim


def _recomputing(
    strategy: Strategy, x: Tensor, bank: Tensor, eta: Tensor, bias: Tensor | None, spec: ConvSpec, chunk: int
) -> Tensor:
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    x, padding = _padded(x, spec)
    pointwise = spec.is_pointwise if strategy == "fused" else strategy == "bmm"
    weight = () if is_own(bank, spec.weight_shape) else spec.weight_shape
    shapes = Shapes(spec.stride, padding, spec.dilation, spec.groups, pointwise, chunk, weight)
    if strategy == "fused":
        return fused_conv(x, bank, eta, bias, shapes)
    return _with_bias(convolve_batch(x, bank, eta, shapes), bias)


def _grouped(x: Tensor, kernels: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    batch = x.shape[0]
    out = convolve(
        x.reshape(1, batch * spec.in_channels, *x.shape[2:]),
        kernels.reshape(batch * spec.out_channels, *kernels.shape[2:]),
        None if bias is None else bias.repeat(batch),
        spec,
        spec.groups * batch,
    )
    return out.reshape(batch, spec.out_channels, *out.shape[2:])


def _pointwise(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.bmm(kernels.flatten(2), x.flatten(2))
    return _with_bias(out.reshape(x.shape[0], -1, *x.shape[2:]), bias)


def _scan(x: Tensor, kernels: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    from torch._higher_order_ops.scan import scan  # no public name yet, and slow to import

    def one(carry: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        image, kernel = pair
        return carry.clone(), convolve(image.unsqueeze(0), kernel, bias, spec, spec.groups).squeeze(0)

    out: Tensor = scan(one, x.new_zeros(()), (x, kernels))[1]
    return out


def _by_taps(x: Tensor, kernels: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    size = spec.output_size(x.shape[2:])
    x, padding = _padded(x, spec)
    x = F.pad(x, [side for pad in reversed(padding) for side in (pad, pad)])
    taps = kernels.flatten(3).unflatten(1, (spec.groups, -1))  # [B, groups, out / groups, in / groups, taps]
    out: Tensor | None = None
    for tap, place in enumerate(product(*map(range, spec.kernel_size))):
        first = [at * d for at, d in zip(place, spec.dilation, strict=True)]
        seen = (slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(first, spec.stride, size, strict=True))
        rows = x[(slice(None), slice(None), *seen)].unflatten(1, (spec.groups, -1)).flatten(3)
        term = taps[..., tap] @ rows
        out = term if out is None else out + term
    assert out is not None
    return _with_bias(out.reshape(x.shape[0], spec.out_channels, *size), bias)


def _features(x: Tensor, bank: Tensor, eta: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    maps = convolve(x, bank.flatten(0, 1), None, spec, spec.groups)
    maps = maps.reshape(*eta.shape, *maps.shape[2:])
    out = (maps * eta.reshape(*eta.shape, *(1,) * spec.ndim)).sum(2).to(maps.dtype)
    return _with_bias(out, bias)


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + per_channel(bias, out)
