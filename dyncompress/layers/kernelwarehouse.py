"""KernelWarehouse: the kernels of a whole stage are mixed, piece by piece, from one store of cells.

Paper: Li, Yao, "KernelWarehouse: Rethinking the Design of Dynamic Convolution", ICML 2024, arXiv 2406.07879, section 3.
A kernel is cut in m cells of [cell_out, cell_in] weights, 1x1 in space; each is a mix of the n cells e_j of a warehouse
that several layers share. For image b and cell i of a layer::

    z[b] = FC2(ReLU(LayerNorm(FC1(GAP(x[b])))))                                   [m, n + 1]
    alpha[b, i, j] = (1 - tau) * z[b, i, j] / (sum_p |z[b, i, p]| + 0.001) + tau * beta[i, j]
    kernel[b, cell i] = sum over j <= n of: alpha[b, i, j] * e[j]

alpha may be negative, and entry n + 1 is a cell of zeros: it takes what the others leave. tau falls from 1 to 0 in the
first part of the training. While it is 1, every cell of the layer has its own fixed place, beta.

Deviations from the paper:

* LayerNorm in the router, as the authors have it in ConvNeXt; their BatchNorm can't train on one image.
* Where widths have no large common divisor, as in narrowed networks, cells overhang the kernel and are cut off. The
  paper always takes the divisor: cells of 37 for widths of 37 and 74, but of 1 for 37 and 75, thousands of them.
* Each layer holds the cells that start as its own; the warehouse is those of all its layers.
* A ratio 1/q gives m / q cells to a layer, rounded up as its pattern says; the paper asks that q divides m.
* A warm start (``load_static``) cuts the static kernel into cells. At ratios below 1 it is the best approximation of
  that rank, mixed by the router's bias, and tau is 0 at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError, shown
from dyncompress.layers.method import DynamicConv, Method, register_method
from dyncompress.layers.mixing import full_precision
from dyncompress.layers.perimage import convolve_each
from dyncompress.layers.router import RouterLinear, Squeeze
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static

__all__ = ["KernelWarehouse", "WarehouseConv"]

_RATIOS = (*(1 / q for q in range(8, 1, -1)), *range(1, 9))
_REDUCTION, _LEAST_HIDDEN = 16, 16  # of the router
_LEAST = 1e-3  # added to the sum of |z|
# A common divisor below this part of the widest layer would make more cells than weights in them, and a router of as
# many rows.
_SMALLEST_CELL = 16


@register_method("kernelwarehouse")
@dataclass(frozen=True)
class KernelWarehouse:
    """Options of KernelWarehouse.

    Args:
        ratio: Cells of the warehouse over those of the kernels: parameters over those of the static layers, but for
            the routers. 1/8 to 1/2 (as fractions 1/q) or 1 to 8.
        cell: Width of a cell over the common divisor of the layers' widths, in both channels; by default 1, and 1/2
            where the ratio is below 1, as the authors have in ResNet-18.
        warmup: Part of the training in which tau falls from 1 to 0; the authors have 20 of 300 epochs.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 2406.07879, section 3; the authors' code for what it leaves open.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "KernelWarehouse: Rethinking the Design of Dynamic Convolution, arXiv 2406.07879"

    ratio: float = 1
    cell: float | None = None
    warmup: float = 1 / 15

    def __post_init__(self) -> None:
        if not _is_number(self.ratio) or not any(math.isclose(self.ratio, known) for known in _RATIOS):
            raise DynCompressError(
                f"ratio {shown(self.ratio)} gives layers no whole numbers of cells: give 1 to 8, or 1/2 to 1/8"
            )
        if self.cell is not None and (not _is_number(self.cell) or not 0 < self.cell <= 1):
            raise DynCompressError(
                f"cell {shown(self.cell)} is no width of a cell: give a part of the common divisor, 1 or 0.5, say"
            )
        if not _is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise DynCompressError(
                f"warmup {shown(self.warmup)} is no part of the training: give 0 (none) to 1, 1/15 say"
            )

    @property
    def exceptions(self) -> dict[str, str]:
        """Clauses of the contract that the ratio rules out."""
        exact = "warm_start_is_the_static_network"
        return {} if self.ratio >= 1 else {exact: "a warehouse of fewer cells than the kernels have can't hold them"}

    @property
    def sharing(self) -> Literal["layer", "block", "stage"]:
        """The layers of a stage are built together."""
        return "stage"

    def place(self, site: ConvSite) -> tuple[Method, str]:
        """Everywhere but on depthwise convolutions, whose kernels have no channels to cut cells from."""
        if site.spec.is_depthwise:
            return (
                Static(),
                f"static: depthwise, {site.spec.kernel_params:,} weights; its cells would be single numbers",
            )
        return self, ""

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image, with m cells in a kernel of P weights and n in the warehouse.

        conv = P * S, kernels = m * n * cell (n * P, where cells overhang nowhere),
        router = channels * hidden + hidden * m * (n + 1), hidden = max(16, channels // 16).
        That makes more MACs, never less: parameters are what it saves.

        Example:
            >>> KernelWarehouse().macs([ConvSite("c", ConvSpec(64, 64, (3, 3)), positions=100)])  # m = n = 9
            [Macs(conv=3686400, kernels=331776, router=2464)]
        """
        store = self._store(sites)
        costs = []
        for site, grid in zip(sites, store.grids, strict=True):
            channels, hidden = site.spec.in_channels, _hidden(site.spec)
            kernels = grid.pieces * store.cells * store.out * store.into
            router = channels * hidden + hidden * grid.pieces * (store.cells + 1)
            costs.append(Macs(site.spec.kernel_params * site.positions, kernels, router))
        return costs

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: a layer's own cells, its bias, and its router: both linear layers and the norm between."""
        store = self._store(sites)
        counts = []
        for site, grid, owners in zip(sites, store.grids, store.owners, strict=True):
            hidden, rows = _hidden(site.spec), grid.pieces * (store.cells + 1)
            router = (site.spec.in_channels + 1) * hidden + 2 * hidden + (hidden + 1) * rows
            counts.append(len(owners) * store.out * store.into + site.spec.out_channels * site.spec.bias + router)
        return counts

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site, with one warehouse for all."""
        store = self._store(sites)
        layers: list[WarehouseConv] = []
        first = 0
        for site, grid, owners in zip(sites, store.grids, store.owners, strict=True):
            layers.append(WarehouseConv(site.spec, grid, (store.out, store.into), owners, first, store.cells, self))
            first += len(owners)
        warehouse = Warehouse(layers)
        for layer in layers:
            layer.warehouse = warehouse
        return list(layers)

    def _store(self, sites: Sequence[ConvSite]) -> _Store:
        part = self.cell if self.cell is not None else 1.0 if self.ratio >= 1 else 0.5
        out = _cell([site.spec.weight_shape[0] for site in sites], part)
        into = _cell([site.spec.weight_shape[1] for site in sites], part)
        grids = [
            _Grid(
                math.prod(site.spec.kernel_size),
                -(-site.spec.weight_shape[0] // out),
                -(-site.spec.weight_shape[1] // into),
            )
            for site in sites
        ]
        owners = [self._owners(grid.pieces) for grid in grids]
        return _Store(out, into, grids, owners, sum(map(len, owners)))

    def _owners(self, count: int) -> list[int]:
        """Which cell of the kernel each cell of the layer belongs to at first; -1 for none."""
        if self.ratio >= 1:
            times = round(self.ratio)
            return [i if r == 0 else -1 for i in range(count) for r in range(times)]
        q = round(1 / self.ratio)
        return [i for i in range(count) if i % q == (i // q) % q]


class _Grid(NamedTuple):
    """How many cells a kernel has: in space, along the output channels, along the input channels."""

    space: int
    out: int
    into: int

    @property
    def pieces(self) -> int:
        """All of them, m."""
        return self.space * self.out * self.into


class _Store(NamedTuple):
    out: int  # channels of a cell
    into: int
    grids: list[_Grid]  # per layer
    owners: list[list[int]]  # per layer and own cell, its place in the kernel
    cells: int  # in all


class Warehouse:
    """The cells of all layers that share; a plain object, so that no layer owns another."""

    def __init__(self, layers: Sequence[WarehouseConv]) -> None:
        self._layers = list(layers)

    def cells(self) -> Tensor:
        """[n, cell_out * cell_in]."""
        owned = [layer.cells.flatten(1) for layer in self._layers]
        return owned[0] if len(owned) == 1 else torch.cat(owned)


class WarehouseConv(DynamicConv):
    """A convolution whose kernel is put together from the cells of a warehouse.

    Args:
        spec: Shapes of the convolution.
        grid: Cells of its kernel.
        cell: Output and input channels of a cell.
        owners: Per own cell, its place in the kernel at first, or -1.
        first: Place of its first cell in the warehouse.
        cells: Number of cells of the warehouse.
        method: The options.
    """

    method: ClassVar[str] = "kernelwarehouse"
    bias: nn.Parameter | None
    beta: Tensor
    tau: Tensor
    warehouse: Warehouse

    def __init__(
        self,
        spec: ConvSpec,
        grid: _Grid,
        cell: tuple[int, int],
        owners: Sequence[int],
        first: int,
        cells: int,
        method: KernelWarehouse,
    ) -> None:
        super().__init__(spec)
        self.grid, self.first, self.warmup, self.whole = grid, first, method.warmup, method.ratio >= 1
        self.cells = nn.Parameter(torch.empty(len(owners), *cell))
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.out_channels)) if spec.bias else None)
        hidden = _hidden(spec)
        self.squeeze = Squeeze(spec.in_channels)
        self.reduce = RouterLinear(spec.in_channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.router = RouterLinear(hidden, grid.pieces * (cells + 1))
        # Buffers in the state dict: a checkpoint from before the end of the schedule computes what was trained.
        beta = torch.zeros(grid.pieces, cells + 1)
        beta[:, -1] = 1
        for index, place in enumerate(owners):
            if place >= 0:
                beta[place, -1], beta[place, first + index] = 0, 1
        self.register_buffer("beta", beta)
        self.register_buffer("tau", torch.ones(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from scratch, as the authors do: normal with the variance of the fan out, tau = 1."""
        nn.init.kaiming_normal_(self.cells.data.flatten(0, 1), mode="fan_out", nonlinearity="relu")
        for linear in (self.reduce, self.router):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.tau.fill_(1.0 if self.warmup else 0.0)

    def anneal(self, progress: float) -> None:
        """Let tau fall linearly to 0 within the warm-up; it never rises again."""
        self.tau.clamp_(max=max(0.0, 1 - progress / self.warmup) if self.warmup else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        return convolve_each(x, self.assemble(self.coefficients(x)), self.bias, self.spec)

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients [B, m, n] of x [B, in, *size], in fp32 at least."""
        mean = self.squeeze(x)
        with full_precision(mean):
            h = self.reduce(mean)
            h = F.layer_norm(h, h.shape[1:], self.norm.weight.to(h), self.norm.bias.to(h), self.norm.eps).relu()
            z = self.router(h).reshape(-1, *self.beta.shape)
            share = z / (z.abs().sum(-1, keepdim=True) + _LEAST)
            tau = self.tau.to(z)
            alpha: Tensor = ((1 - tau) * share + tau * self.beta.to(z))[..., :-1]
            return alpha

    def assemble(self, alpha: Tensor) -> Tensor:
        """Kernels [B, out, in / groups, *kernel] of coefficients [B, m, n]."""
        cells, (space, out, into) = self.warehouse.cells(), self.grid
        with full_precision(cells):
            mixed = alpha.to(cells.dtype).flatten(0, 1) @ cells
        mixed = mixed.reshape(-1, space, out, into, *self.cells.shape[1:]).permute(0, 2, 4, 3, 5, 1)
        whole = mixed.reshape(-1, out * self.cells.shape[1], into * self.cells.shape[2], space)
        wide, deep = self.spec.weight_shape[:2]
        return whole[:, :wide, :deep].reshape(-1, wide, deep, *self.kernel_size)

    @torch.no_grad()
    def load_static(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        spare: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Cut the kernel into cells, and let the router's bias put them back where they were.

        From a ratio of 1 on this is exact, and stays within 0.1 % while tau falls: normalised, a z that is beta is
        beta / 1.001. Cells in excess start as noise. Below 1 the cells are the leading singular vectors of the kernel's
        [m, cell]: no other choice of so few is closer.

        See :meth:`DynamicConv.load_static` for arguments and errors.
        """
        self.check_static(weight, bias, spare)
        pieces = self._cut(weight.to("cpu", torch.float64))
        own = slice(self.first, self.first + len(self.cells))
        if self.whole:
            start, cells = self.beta, self.beta[:, own].to(pieces).T @ pieces
            free = ~self.beta[:, own].any(0).cpu()
            rms = pieces.square().mean().sqrt().item() or pieces.shape[1] ** -0.5
            device = generator.device if generator is not None else None
            noise = torch.randn(cells.shape, generator=generator, device=device).to(cells)
            cells[free] = rms * noise[free]
        else:
            mix, cells = _low_rank(pieces, len(self.cells))
            start = torch.zeros_like(self.beta)
            start[:, own] = mix.to(start)
            start[:, -1] = 1 - start.abs().sum(1)
            cells = cells * (1 + _LEAST)  # as the sum of |z| is 1
        self.cells.copy_(cells.reshape(self.cells.shape))
        self.router.weight.zero_()
        self.router.bias.copy_(start.flatten())
        self.tau.fill_(1.0 if self.whole else 0.0)
        if self.bias is not None:
            self.bias.copy_(bias if bias is not None else torch.zeros_like(self.bias))

    def _cut(self, weight: Tensor) -> Tensor:
        """The cells [m, cell] of a kernel, with zeros where they overhang it."""
        (space, out, into), (wide, deep) = self.grid, self.cells.shape[1:]
        whole = weight.new_zeros(out * wide, into * deep, space)
        whole[: weight.shape[0], : weight.shape[1]] = weight.flatten(2)
        return whole.reshape(out, wide, into, deep, space).permute(4, 0, 2, 1, 3).reshape(self.grid.pieces, -1)

    def extra_repr(self) -> str:
        """Method, shapes, and cells."""
        m, n = self.beta.shape
        return f"{super().extra_repr()}, {m} cells of {n - 1}, {'x'.join(map(str, self.cells.shape[1:]))}"


def _low_rank(pieces: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product [m, rank] @ [rank, cell]; rows of the first have a sum of magnitudes of at most 1."""
    left, values, right = torch.linalg.svd(pieces, full_matrices=False)
    have = min(rank, len(values))
    mix, cells = pieces.new_zeros(len(pieces), rank), pieces.new_zeros(rank, pieces.shape[1])
    mix[:, :have] = left[:, :have] * values[:have].sqrt()
    cells[:have] = values[:have, None].sqrt() * right[:have]
    scale = mix.abs().sum(1).max().clamp(min=torch.finfo(mix.dtype).tiny)
    return mix / scale, cells * scale


def _cell(widths: Sequence[int], part: float) -> int:
    """Channels of a cell: the common divisor, or the narrowest layer's width where that is small; times a part."""
    divisor = math.gcd(*widths)
    if divisor * _SMALLEST_CELL < max(widths) and divisor < min(widths):
        divisor = min(widths)
    return max(int(divisor * part), 1)


def _hidden(spec: ConvSpec) -> int:
    return max(spec.in_channels // _REDUCTION, _LEAST_HIDDEN)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
