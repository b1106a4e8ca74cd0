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
* Layers whose widths have no large common divisor, as in narrowed networks, don't share. The paper always takes the
  divisor: cells of 37 for widths of 37 and 74, but of 1 for 37 and 75, thousands of them. Here these have a warehouse
  each, and by default so have layers on small maps, which would mix more cells than they have output positions:
  `partition.stored` says which layers share.
* Each layer holds the cells that start as its own; the warehouse is those of all its layers.
* A ratio 1/q gives m / q cells to a layer, rounded up as its pattern says; the paper asks that q divides m.
* A warm start (``load_static``) cuts the static kernel into cells. At ratios below 1 it is the best approximation of
  that rank, mixed by the router's bias, and tau is 0 at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.layers.method import Method, register_method
from dyncompress.layers.options import check_part, is_number
from dyncompress.layers.partition import Grid, Store, stored
from dyncompress.layers.placement import check_placement
from dyncompress.layers.spec import ConvSite, ConvSpec, Macs
from dyncompress.layers.static import Static
from dyncompress.layers.warehouse import Warehouse, WarehouseConv

__all__ = ["KernelWarehouse"]

_RATIOS = (*(1 / q for q in range(8, 1, -1)), *range(1, 9))
_LEAST_HIDDEN = 16  # of the router
_LEAST_BASIS = 16
_MIXING = 1 / 4  # of a convolution's cost: the most that layers share for


@register_method("kernelwarehouse")
@dataclass(frozen=True)
class KernelWarehouse:
    """Options of KernelWarehouse.

    Args:
        ratio: Cells of the warehouse over those of the kernels: parameters over those of the static layers, but for
            the routers. 1/8 to 1/2 (as fractions 1/q) or 1 to 8.
        cell: Width of a cell over the common divisor of the layers' widths, in both channels; by default 1, and 1/2
            where the ratio is below 1, as the authors have in ResNet-18.
        cell_in: The same for input channels, where it differs.
        basis: Logits for cells of other layers are made from a basis of so many of them, 16 at least, instead of each
            its own, below 1: smaller routers (1/16 in the authors' ResNet-50 at a ratio of 1/2).
        reduction: Hidden features of the router over input channels; 16 at least.
        warmup: Part of the training in which tau falls from 1 to 0; the authors have 20 of 300 epochs.
        placement: ``"auto"``: not on depthwise convolutions, nor on what has a single output position, such as a
            classifier; and layers share only while none mixes more cells than a quarter of its output positions.
            ``"all"``: there, too, as in the authors' MobileNetV2, where depthwise layers share with each other, and
            however many cells that makes.

    Raises:
        DynCompressError: If an option has no such value.

    Source:
        arXiv 2406.07879, section 3; the authors' code for what it leaves open.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "KernelWarehouse: Rethinking the Design of Dynamic Convolution, arXiv 2406.07879"
    adapts: ClassVar[str] = "a mix per cell"
    linear: ClassVar[bool] = True

    ratio: float = 1
    cell: float | None = None
    cell_in: float | None = None
    basis: float = 1
    reduction: float = 1 / 16
    warmup: float = 1 / 15
    placement: Literal["auto", "all"] = "auto"

    def __post_init__(self) -> None:
        check_placement(self.placement)
        if not is_number(self.ratio) or not any(math.isclose(self.ratio, known) for known in _RATIOS):
            raise DynCompressError(
                f"ratio {shown(self.ratio)} gives layers no whole numbers of cells: give 1 to 8, or 1/2 to 1/8"
            )
        for option, part in (("cell", self.cell), ("cell_in", self.cell_in)):
            if part is not None and (not is_number(part) or not 0 < part <= 1):
                raise DynCompressError(
                    f"{option} {shown(part)} is no width of a cell: give a part of the common divisor, 1 or 0.5, say"
                )
        for option, part, of in (
            ("basis", self.basis, "the cells of other layers, 1/16 say, or 1 for no basis"),
            ("reduction", self.reduction, "the input channels, 1/16 say"),
        ):
            if not is_number(part) or not 0 < part <= 1:
                raise DynCompressError(f"{option} {shown(part)} is no part between 0 and 1: give one of {of}")
        check_part("warmup", self.warmup, "the training", "0 (none) to 1, 1/15 say")

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
        """Everywhere; by default but where cells would be single numbers, or a kernel is used once."""
        if self.placement == "auto":
            weights = site.spec.kernel_params
            if site.spec.is_depthwise:
                return Static(), f"static: depthwise, {weights:,} weights; its cells would be single numbers"
            if site.positions == 1:
                return Static(), f"static: one output position; mixing {weights:,} weights takes longer than using them"
        return self, ""

    def macs(self, sites: Sequence[ConvSite]) -> list[Macs]:
        """Multiply-adds per image, with m cells in a kernel of P weights, n in the warehouse and l the layer's own.

        conv = P * S, kernels = m * n * cell (n * P, where cells overhang nowhere),
        router = channels * hidden + hidden * m * (n + 1), hidden = max(16, channels * reduction). With a basis of b:
        channels * hidden + hidden * m * (l + b + 1) + m * b * (n - l).
        That makes more MACs, never less: parameters are what it saves.

        Example:
            >>> KernelWarehouse().macs([ConvSite("c", ConvSpec(64, 64, (3, 3)), positions=100)])  # m = n = 9
            [Macs(conv=3686400, kernels=331776, router=2464)]
        """
        costs = []
        for site, store, grid, owners in self._cut(sites):
            kernels = grid.pieces * store.cells * store.out * store.into
            channels, hidden = site.spec.in_channels, _hidden(site.spec, self.reduction)
            others = store.cells - len(owners)
            if basis := self._basis(others):
                logits = hidden * (len(owners) + basis + 1) + basis * others
            else:
                logits = hidden * (store.cells + 1)
            router = channels * hidden + grid.pieces * logits
            costs.append(Macs(site.spec.kernel_params * site.positions, kernels, router))
        return costs

    def params(self, sites: Sequence[ConvSite]) -> list[int]:
        """Parameters: a layer's own cells, its bias, and its router: both linear layers and the norm between."""
        counts = []
        for site, store, grid, owners in self._cut(sites):
            hidden, others = _hidden(site.spec, self.reduction), store.cells - len(owners)
            offsets = grid.pieces * (store.cells + 1)
            if basis := self._basis(others):
                logits = hidden * grid.pieces * (len(owners) + basis + 1) + basis * others
            else:
                logits = hidden * offsets
            router = (site.spec.in_channels + 1) * hidden + 2 * hidden + logits + offsets
            counts.append(len(owners) * store.out * store.into + site.spec.out_channels * site.spec.bias + router)
        return counts

    def build(self, sites: Sequence[ConvSite]) -> list[nn.Module]:
        """One layer per site; those that share hold one warehouse."""
        layers: list[WarehouseConv] = []
        filled: dict[int, list[WarehouseConv]] = {}
        for site, store, grid, owners in self._cut(sites):
            before = filled.setdefault(store.members[0], [])
            layer = WarehouseConv(
                site.spec,
                grid,
                (store.out, store.into),
                owners,
                sum(each.own for each in before),
                store.cells,
                hidden=_hidden(site.spec, self.reduction),
                basis=self._basis(store.cells - len(owners)),
                warmup=self.warmup,
                whole=self.ratio >= 1,
            )
            before.append(layer)
            layers.append(layer)
        for members in filled.values():
            warehouse = Warehouse(members)
            for layer in members:
                layer.warehouse = warehouse
        return list(layers)

    def _stores(self, sites: Sequence[ConvSite]) -> list[Store]:
        out = self.cell if self.cell is not None else 1.0 if self.ratio >= 1 else 0.5
        mixing = _MIXING if self.placement == "auto" else math.inf
        return stored(sites, self.ratio, (out, out if self.cell_in is None else self.cell_in), mixing)

    def _cut(self, sites: Sequence[ConvSite]) -> list[tuple[ConvSite, Store, Grid, list[int]]]:
        """Per layer its warehouse, how its kernel is cut, and the cells that it brings, in the order of the layers."""
        cut = {
            index: (sites[index], store, grid, owners)
            for store in self._stores(sites)
            for index, grid, owners in zip(store.members, store.grids, store.owners, strict=True)
        }
        return [cut[index] for index in range(len(sites))]

    def _basis(self, others: int) -> int:
        """Size of the basis for so many cells of other layers; 0 for none."""
        return max(int(others * self.basis), _LEAST_BASIS) if self.basis < 1 and others else 0


def _hidden(spec: ConvSpec, reduction: float) -> int:
    return max(int(spec.in_channels * reduction), _LEAST_HIDDEN)
