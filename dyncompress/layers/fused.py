"""One Triton kernel that mixes each image's kernels on the chip and convolves with them at once.

State: checked in Triton's interpreter on a CPU, and compiled for sm_80 and sm_90 (Triton 3.9; the tiles below fit their
registers at g = 4). Not yet run or measured on a GPU.

The other strategies write B mixed kernels of P weights to memory and read them again; on small maps that is most of
the time. Here a program computes a tile of `positions` pixels, `outs` channels and `images` images. It walks along the
weights of a kernel, and at each step reads one piece of the bank for all of its images:

    for piece in (in / groups * prod(kernel)) / weights:
        kernels[i] = bank[outs, i, piece]                                  for each of g, read once
        for b in images:
            w      = sum_i eta[b, outs, i] * kernels[i]                     fp32, in registers
            acc[b] = acc[b] + w @ x[b][piece, positions]                    tensor cores, fp32 sums

x[b][piece, positions] is the matrix of patches (im2col), which is read straight from the image: nothing is unfolded or
padded in memory. Backward is that of :mod:`dyncompress.layers.recompute`.
"""
# ruff: noqa: RUF005 -- Triton knows tuples, but no (*tiles, tile)

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

from dyncompress.errors import DynCompressError
from dyncompress.layers.recompute import Shapes, gradients
from dyncompress.layers.spec import ConvSpec

__all__ = ["fused_conv", "unsupported"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = (3, 3)  # 3.2 can't compile it: no loops that carry tuples
_SIDE = 16  # the smallest side of a product on tensor cores

tl: Any = None  # triton.language, once there is a kernel to compile: the kernel finds it here, as Triton demands


class Tile(NamedTuple):
    """What one program computes, and the piece of a kernel that it holds meanwhile; all powers of two."""

    images: int
    outs: int
    positions: int
    weights: int
    warps: int


def unsupported(x: Tensor, bank: Tensor, spec: ConvSpec) -> str:
    """Why the kernel can't compute a convolution, by its shapes and dtypes; empty if it can.

    Args:
        x: [B, in, *size].
        bank: [out, g, in / groups, *kernel].
        spec: The convolution.
    """
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    if spec.groups != 1:
        return f"groups {spec.groups}, not 1"
    if spec.ndim > 2:
        return f"{spec.ndim} spatial dimensions, not 1 or 2"
    if x.dtype not in _DTYPES or bank.dtype not in _DTYPES:
        return f"x in {x.dtype} and the bank in {bank.dtype}, not in float32, bfloat16 or float16"
    if not x.shape[0] or min(spec.output_size(x.shape[2:])) < 1:
        return f"nothing to compute for an input {list(x.shape)}"
    return ""


def fused_conv(x: Tensor, bank: Tensor, eta: Tensor, bias: Tensor | None, shapes: Shapes) -> Tensor:
    """Convolve each image with its own mix of the bank's kernels, which are never written to memory.

    out[b, t] = bias[t] + sum_i eta[b, t, i] * conv(x[b], bank[t, i]); coefficients, mixing and sums are in fp32, the
    mixed weights are rounded to the dtype of x. Products of fp32 numbers are in TF32 where torch's convolutions are.

    Args:
        x: [B, in, *size] in fp32, bf16 or fp16, B at least 1, one or two spatial dimensions.
        bank: [out, g, in, *kernel], in x's dtype or (under autocast) fp32.
        eta: [B, out, g], any floating dtype.
        bias: [out], or None.
        shapes: The rest of the convolution, of one group; its padding is zeros.

    Returns:
        [B, out, *size'], contiguous, in the dtype of x. Its gradients are those of
        :func:`dyncompress.layers.recompute.convolve_batch`.

    Raises:
        DynCompressError: If there is no Triton, x is not on a GPU, or the shapes don't fit each other.
    """
    expected = (x.shape[0], *bank.shape[:2])
    if eta.shape != expected or x.shape[1] != bank.shape[2] or (bias is not None and bias.shape != bank.shape[:1]):
        # Checked here, since a kernel would read beyond the end of a tensor instead of failing.
        raise DynCompressError(
            f"x {list(x.shape)}, bank {list(bank.shape)}, eta {list(eta.shape)} and bias"
            f" {None if bias is None else list(bias.shape)} don't belong together: with this x and bank, give x the"
            f" {bank.shape[2]} channels of the bank, eta the shape {list(expected)} and bias {list(bank.shape[:1])}"
        )
    _kernel(x.device.type)  # here, because an error inside of an autograd function would carry a longer trace
    out: Tensor = _FusedConv.apply(x, bank, eta, bias, shapes)  # type: ignore[no-untyped-call]
    return out


class _FusedConv(torch.autograd.Function):
    """Forward on the chip; backward is made of ops that have gradients, so that it has some itself."""

    @staticmethod
    def forward(x: Tensor, bank: Tensor, eta: Tensor, bias: Tensor | None, shapes: Shapes) -> Tensor:
        return _launch(x, bank, eta, bias, shapes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bank, eta, bias, ctx.shapes = inputs
        ctx.save_for_backward(x, bank, eta)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *of_out: Tensor) -> tuple[Tensor | None, ...]:
        x, bank, eta = ctx.saved_tensors
        of_bias = None
        if ctx.needs_input_grad[3]:
            of_bias = of_out[0].sum((0, *range(2, x.ndim)), dtype=torch.float32).to(ctx.bias_dtype)
        return *gradients(of_out[0], x, bank, eta, ctx.shapes, ctx.needs_input_grad[0]), of_bias, None


def _launch(x: Tensor, bank: Tensor, eta: Tensor, bias: Tensor | None, shapes: Shapes) -> Tensor:
    kernel, interpreted = _kernel(x.device.type)
    kh, kw = _two(bank.shape[3:], 1)
    (sh, sw), (ph, pw), (dh, dw) = _two(shapes.stride, 1), _two(shapes.padding, 0), _two(shapes.dilation, 1)
    height, width = _two(x.shape[2:], 1)
    rows = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    columns = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    image = x.unsqueeze(2) if x.ndim == 3 else x
    flat = (bank if bank[0, 0].is_contiguous() else bank.contiguous()).flatten(2)
    outs, positions = bank.shape[0], rows * columns
    out = x.new_empty(x.shape[0], outs, *(rows, columns)[4 - x.ndim :])
    processors = 1 if interpreted else torch.cuda.get_device_properties(x.device).multi_processor_count
    tile = _tile(x.shape[0], outs, positions, x.dtype == torch.float32, processors)
    grid = (math.ceil(x.shape[0] / tile.images) * math.ceil(positions / tile.positions), math.ceil(outs / tile.outs))
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        kernel[grid](
            image, flat, eta, None if bias is None else bias.contiguous(), out, *image.shape, outs, rows, columns,
            *image.stride(), *flat.stride()[:2], *eta.stride(), bank.shape[1], kh, kw, sh, sw, ph, pw, dh, dw,
            tile.images, tile.outs, tile.positions, tile.weights, "tf32" if _tf32() else "ieee", interpreted,
            num_warps=tile.warps, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _two(sizes: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """Rows and columns; one dimension is one row."""
    return (fill,) * (2 - len(sizes)) + tuple(sizes)


def _tile(batch: int, outs: int, positions: int, single: bool, processors: int) -> Tile:
    """A tile as large as registers hold, or smaller where some of the GPU's processors would have none.

    By arithmetic and by what the compiler says of registers, not by measurement. A piece of the bank is read once for
    `images` * `positions` columns of products, so that more of them means less traffic.

    Args:
        batch: Images.
        outs: Output channels.
        positions: Output pixels of an image.
        single: Whether x is in single precision, whose pieces take twice the room.
        processors: Multiprocessors of the GPU.
    """
    images, down, across = min(4, 1 << (batch - 1).bit_length()), min(64, _power(outs)), min(64, _power(positions))
    others = math.ceil(batch / images) * math.ceil(positions / across)
    while down > _SIDE and others * math.ceil(outs / down) < processors:
        down //= 2
    return Tile(images, down, across, _SIDE, warps=8 if single else 4)


def _power(size: int) -> int:
    """The smallest side of a tile that holds so many."""
    return max(_SIDE, 1 << (size - 1).bit_length())


def _tf32() -> bool:
    """Whether torch's convolutions round fp32 numbers to TF32."""
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9; from then on the older name may raise
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")
    return torch.backends.cudnn.allow_tf32


@functools.cache
def _compiler() -> tuple[Any, bool]:
    """The kernel for Triton to compile, and whether Triton's interpreter runs it instead."""
    global tl
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise DynCompressError(
            f"there is no Triton here ({error}); the strategy 'fused' needs version 3.3 or later: install a CUDA build"
            " of torch, which brings it, or choose another strategy, such as 'grouped'"
        ) from None
    if tuple(map(int, triton.__version__.split(".")[:2])) < _TRITON:
        raise DynCompressError(
            f"Triton {triton.__version__} is too old for the strategy 'fused', which needs version 3.3 or later:"
            " install a later torch, which brings it, or choose another strategy, such as 'grouped'"
        )
    tl = triton.language
    kernel = triton.jit(_convolve_tile)
    return kernel, not isinstance(kernel, triton.JITFunction)


def _kernel(device: str) -> tuple[Any, bool]:
    kernel, interpreted = _compiler()
    if device != "cuda" and not interpreted:
        raise DynCompressError(
            f"x is on the device {device!r}; the strategy 'fused' runs on 'cuda': move network and input there, or"
            " choose another strategy, such as 'grouped' (tests on a CPU: TRITON_INTERPRET=1)"
        )
    return kernel, interpreted


@no_type_check  # it's Triton's, a language that looks like Python
def _convolve_tile(
    x, bank, eta, bias, out,
    batch, channels, height, width, outs, rows, columns,
    x_image, x_channel, x_row, x_column, bank_out, bank_kernel,
    eta_image, eta_out, eta_kernel,
    g: tl.constexpr, kh: tl.constexpr, kw: tl.constexpr, sh: tl.constexpr, sw: tl.constexpr,
    ph: tl.constexpr, pw: tl.constexpr, dh: tl.constexpr, dw: tl.constexpr,
    images: tl.constexpr, down: tl.constexpr, across: tl.constexpr, depth: tl.constexpr,
    precision: tl.constexpr, interpreted: tl.constexpr,
):  # fmt: skip
    """The program of one tile: [images, down, across] of [batch, outs, rows * columns].

    Strides are in elements. The weights of a kernel are one row: channel by channel, row by row, as the bank has them.
    """
    positions, weights = rows * columns, channels * kh * kw
    tiles = tl.cdiv(positions, across)
    first = tl.program_id(0) // tiles * images
    p = tl.program_id(0) % tiles * across + tl.arange(0, across)
    o = tl.program_id(1) * down + tl.arange(0, down)
    is_out, is_position = o < outs, p < positions
    # The upper left pixel of each position's patch; a position that isn't there lies above the image.
    top = tl.where(is_position, p // columns * sh - ph, -(1 << 30))
    left = p % columns * sw - pw
    corner = (p // columns * sh - ph) * x_row + left * x_column
    bank_rows = bank + o.to(tl.int64)[:, None] * bank_out

    sums = ()
    for _ in tl.static_range(images):
        sums = sums + (tl.zeros((down, across), tl.float32),)
    for start in range(0, weights, depth):
        k = start + tl.arange(0, depth)
        is_weight = k < weights
        tap = k % (kh * kw)
        y, z = tap // kw * dh, tap % kw * dw
        place = k // (kh * kw) * x_channel + y * x_row + z * x_column
        row, column = top[None, :] + y[:, None], left[None, :] + z[:, None]
        is_pixel = is_weight[:, None] & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixels = place[:, None] + corner[None, :]
        kernels = ()
        for i in tl.static_range(g):
            piece = bank_rows + (i * bank_kernel + k)[None, :]
            kernels = kernels + (tl.load(piece, is_out[:, None] & is_weight[None, :], 0.0).to(tl.float32),)
        done = ()
        for j in tl.static_range(images):
            b = tl.minimum(first + j, batch - 1).to(tl.int64)  # what is beyond the last image is computed, not stored
            mixed = tl.zeros((down, depth), tl.float32)
            for i in tl.static_range(g):
                share = tl.load(eta + b * eta_image + o * eta_out + i * eta_kernel, is_out, 0.0).to(tl.float32)
                mixed += share[:, None] * kernels[i]
            patches = tl.load(x + b * x_image + pixels, is_pixel, 0.0)
            mixed = mixed.to(patches.dtype)
            if interpreted:  # it multiplies the bits of bf16 numbers as if they were integers
                mixed, patches = mixed.to(tl.float32), patches.to(tl.float32)
            done = done + (tl.dot(mixed, patches, sums[j], input_precision=precision),)
        sums = done
    for j in tl.static_range(images):
        result = sums[j]
        if bias is not None:
            result += tl.load(bias + o, is_out, 0.0).to(tl.float32)[:, None]
        if first + j < batch:
            place = ((first + j).to(tl.int64) * outs + o[:, None]) * positions + p[None, :]
            tl.store(out + place, result.to(out.dtype.element_ty), is_out[:, None] & is_position[None, :])
