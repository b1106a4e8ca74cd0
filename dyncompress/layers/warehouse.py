"""A convolution whose kernel is put together from the cells of a warehouse, and the warehouse."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.layers.annealing import remaining
from dyncompress.layers.execution import convolve_each
from dyncompress.layers.method import DynamicConv
from dyncompress.layers.mixing import full_precision
from dyncompress.layers.partition import Grid
from dyncompress.layers.router import RouterLinear, Squeeze
from dyncompress.layers.spec import ConvSpec

__all__ = ["Warehouse", "WarehouseConv"]

_LEAST = 1e-3  # added to the sum of |z|
_LARGE = 1e9  # a variance of features above overflows in the end; LayerNorm does not depend on their scale


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
        hidden: Width of the router.
        basis: Logits per cell of the kernel that those of other layers' cells are made from; 0 for logits of their own.
        warmup: Part of the training in which tau falls.
        whole: Whether the warehouse has a cell for every one of the kernel.
    """

    method: ClassVar[str] = "kernelwarehouse"
    shared: ClassVar[tuple[str, ...]] = ("cells",)
    bias: nn.Parameter | None
    beta: Tensor
    tau: Tensor
    scale: Tensor | None
    warehouse: Warehouse | None

    def __init__(
        self,
        spec: ConvSpec,
        grid: Grid,
        cell: tuple[int, int],
        owners: Sequence[int],
        first: int,
        cells: int,
        *,
        hidden: int,
        basis: int,
        warmup: float,
        whole: bool,
    ) -> None:
        super().__init__(spec)
        self.grid, self.cell, self.first, self.own = grid, cell, first, len(owners)
        self.warmup, self.whole = warmup, whole
        self.cells = nn.Parameter(torch.empty(len(owners), *cell))
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.out_channels)) if spec.bias else None)
        self.squeeze = Squeeze(spec.in_channels)
        self.reduce = RouterLinear(spec.in_channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        logits = self.own + basis + 1 if basis else cells + 1
        self.router = RouterLinear(hidden, grid.pieces * logits, bias=not basis)
        self.basis = RouterLinear(basis, cells - self.own, bias=False) if basis else None
        self.register_parameter("offset", nn.Parameter(torch.empty(grid.pieces * (cells + 1))) if basis else None)
        # Buffers in the state dict: a checkpoint from before the end of the schedule computes what was trained.
        beta = torch.zeros(grid.pieces, cells + 1)
        beta[:, -1] = 1
        for index, place in enumerate(owners):
            if place >= 0:
                beta[place, -1], beta[place, first + index] = 0, 1
        self.register_buffer("beta", beta)
        self.register_buffer("tau", torch.ones(()))
        self.register_buffer("scale", None)  # of the output channels, where `fold` put a BatchNorm's
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from scratch, as the authors do: normal with the variance of the fan out, tau = 1."""
        nn.init.kaiming_normal_(self.cells.data.flatten(0, 1), mode="fan_out", nonlinearity="relu")
        for linear in (self.reduce, self.router, self.basis):
            if linear is not None:
                nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        for offset in (self.reduce.bias, self._start, self.bias):
            if offset is not None:
                nn.init.zeros_(offset)
        self.tau.fill_(1.0 if self.warmup else 0.0)

    @property
    def _start(self) -> Tensor:
        """Logits [m * (n + 1)] that do not depend on the image."""
        start: Tensor = self.router.bias if self.basis is None else self.offset  # type: ignore[assignment]
        return start

    def anneal(self, progress: float) -> None:
        """Let tau fall linearly to 0 within the warm-up; it never rises again."""
        self.tau.clamp_(max=remaining(progress, self.warmup))

    def forward(self, x: Tensor) -> Tensor:
        """Input [B, in, *size] -> [B, out, *size']."""
        self.check_input(x)
        cells = self.cells if self.warehouse is None else self.warehouse.cells()
        return convolve_each(
            x, self.coefficients(x), lambda alpha: (self.assemble(alpha, cells), None), self.bias, self.spec
        )

    def coefficients(self, x: Tensor) -> Tensor:
        """Coefficients [B, m, n] of x [B, in, *size], in fp32 at least."""
        mean = self.squeeze(x)
        with full_precision(mean):
            h = self.reduce(mean)
            h = h / (h.abs().amax(1, keepdim=True) / _LARGE).clamp(min=1)
            h = F.layer_norm(h, h.shape[1:], self.norm.weight.to(h), self.norm.bias.to(h), self.norm.eps).relu()
            z = self._logits(h)
            share = z / (z.abs().sum(-1, keepdim=True) + _LEAST)
            tau = self.tau.to(z)
            alpha: Tensor = ((1 - tau) * share + tau * self.beta.to(z))[..., :-1]
            return alpha

    def _logits(self, h: Tensor) -> Tensor:
        """Logits [B, m, n + 1] of hidden features [B, hidden]."""
        z: Tensor = self.router(h)
        if self.basis is None:
            return z.reshape(-1, *self.beta.shape)
        z = z.unflatten(1, (len(self.beta), -1))
        own, shared, zero = z[..., : self.own], z[..., self.own : -1], z[..., -1:]
        others = self.basis(shared)
        z = torch.cat([others[..., : self.first], own, others[..., self.first :], zero], -1)
        return z + self._start.to(z).reshape(self.beta.shape)

    def assemble(self, alpha: Tensor, cells: Tensor) -> Tensor:
        """Kernels [B, out, in / groups, *kernel] of coefficients [B, m, n] and cells [n, cell_out * cell_in]."""
        space, out, into = self.grid
        with full_precision(cells):
            mixed = alpha.to(cells.dtype).flatten(0, 1) @ cells
        mixed = mixed.reshape(-1, space, out, into, *self.cell).permute(0, 2, 4, 3, 5, 1)
        whole = mixed.reshape(-1, out * self.cell[0], into * self.cell[1], space)
        wide, deep = self.spec.weight_shape[:2]
        kernels = whole[:, :wide, :deep].reshape(-1, wide, deep, *self.kernel_size)
        return kernels if self.scale is None else kernels * self.scale.reshape(-1, *(1,) * (kernels.ndim - 2))

    def start(self, weight: Tensor, bias: Tensor, spare: Tensor | None, generator: torch.Generator | None) -> None:
        """Cut the kernel into cells, and let the router's bias put them back where they were.

        From a ratio of 1 on this is exact, and stays within 0.1 % while tau falls: normalised, a z that is beta is
        beta / 1.001. Cells in excess start as noise. Below 1 the cells are the leading singular vectors of the kernel's
        [m, cell]: no other choice of so few is closer.
        """
        pieces = self._cut(weight.to("cpu", torch.float64))
        own = slice(self.first, self.first + self.own)
        if self.whole:
            start, cells = self.beta, self.beta[:, own].to(pieces).T @ pieces
            free = ~self.beta[:, own].any(0).cpu()
            rms = pieces.square().mean().sqrt().item() or pieces.shape[1] ** -0.5
            device = generator.device if generator is not None else None
            noise = torch.randn(cells.shape, generator=generator, device=device).to(cells)
            cells[free] = rms * noise[free]
        else:
            mix, cells = _low_rank(pieces, self.own)
            start = torch.zeros_like(self.beta)
            start[:, own] = mix.to(start)
            start[:, -1] = 1 - start.abs().sum(1)
            cells = cells * (1 + _LEAST)  # as the sum of |z| is 1
        self.cells.copy_(cells.reshape(self.cells.shape))
        self.router.weight.zero_()
        self._start.copy_(start.flatten())
        self.tau.fill_(1.0 if self.whole else 0.0)

    def _cut(self, weight: Tensor) -> Tensor:
        """The cells [m, cell] of a kernel, with zeros where they overhang it."""
        (space, out, into), (wide, deep) = self.grid, self.cell
        whole = weight.new_zeros(out * wide, into * deep, space)
        whole[: weight.shape[0], : weight.shape[1]] = weight.flatten(2)
        return whole.reshape(out, wide, into, deep, space).permute(4, 0, 2, 1, 3).reshape(self.grid.pieces, -1)

    # ---- as it is shipped ----------------------------------------------------------------------------------------

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Keep the scale for the kernel: a cell serves output channels of several scales and can't hold them."""
        self.scale = scale.detach().to(self.cells.dtype)
        self.absorb_in_bias(scale, shift, self.cells.dtype)
        return True

    @classmethod
    def shipped(cls, layers: Sequence[Any]) -> list[nn.Module]:
        """The cells of all layers that share in one parameter [n, cell_out * cell_in], which each of them holds.

        So none puts the warehouse together for every image.
        """
        copies: list[Any] = deepcopy(list(layers))
        cells: dict[Any, nn.Parameter] = {}
        for layer in copies:
            if layer.warehouse not in cells:
                cells[layer.warehouse] = nn.Parameter(layer.warehouse.cells().detach().clone(), requires_grad=False)
            layer.cells = cells[layer.warehouse]
            layer.warehouse = None
        return copies

    def extra_repr(self) -> str:
        """Method, shapes, and cells."""
        m, n = self.beta.shape
        return f"{super().extra_repr()}, {m} cells of {n - 1}, {'x'.join(map(str, self.cell))}"


def _low_rank(pieces: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product [m, rank] @ [rank, cell]; rows of the first have a sum of magnitudes of at most 1."""
    left, values, right = torch.linalg.svd(pieces, full_matrices=False)
    have = min(rank, len(values))
    mix, cells = pieces.new_zeros(len(pieces), rank), pieces.new_zeros(rank, pieces.shape[1])
    mix[:, :have] = left[:, :have] * values[:have].sqrt()
    cells[:have] = values[:have, None].sqrt() * right[:have]
    scale = mix.abs().sum(1).max().clamp(min=torch.finfo(mix.dtype).tiny)
    return mix / scale, cells * scale
