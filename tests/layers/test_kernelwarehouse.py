"""KernelWarehouse: its equations by hand, its authors' numbers, its warm start, its schedule, what it costs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, KernelWarehouse, Macs, Static, TokenConv
from dyncompress.layers.partition import stored
from dyncompress.layers.warehouse import WarehouseConv

DATA = Path(__file__).parent / "data/kernelwarehouse.safetensors"
SPECS = [
    ConvSpec(4, 4, (2, 2), padding=(1, 0), bias=False),
    ConvSpec(4, 8, (1, 3), stride=(2, 2), padding=(0, 1), bias=False),
    ConvSpec(8, 4, (1, 1), bias=False),
]
HALF = [SPECS[0], ConvSpec(4, 8, (1, 1), stride=(2, 2), bias=False)]
LINEAR = [ConvSpec(4, 8, (1,), bias=False), ConvSpec(8, 4, (1,), bias=False)]


def build(*specs: ConvSpec, **options: Any) -> list[WarehouseConv]:
    """Layers that share as the authors' do, on however small a map."""
    layers = KernelWarehouse(**{"placement": "all", **options}).build(
        [ConvSite("conv", spec, positions=25) for spec in specs]
    )
    assert all(isinstance(layer, WarehouseConv) for layer in layers)
    return layers  # type: ignore[return-value]


def statics(*specs: ConvSpec) -> list[Any]:
    return Static().build([ConvSite("conv", spec, positions=25) for spec in specs])


# The forward pass


def test_one_cell_by_hand() -> None:
    (conv,) = build(ConvSpec(1, 1, (1, 1), bias=False))
    conv.anneal(1.0)
    with torch.no_grad():
        conv.cells.fill_(2.0)
        conv.router.weight.zero_()
        conv.router.bias.copy_(torch.tensor([3.0, -1.0]))  # of the cell, and of the cell of zeros
    # alpha = 3 / (3 + 1 + 0.001); the kernel is alpha times the cell.
    assert conv(torch.ones(1, 1, 1, 1)).item() == pytest.approx(2 * 3 / 4.001)
    conv.tau.fill_(0.25)
    assert conv(torch.ones(1, 1, 1, 1)).item() == pytest.approx(2 * (0.75 * 3 / 4.001 + 0.25))


@pytest.mark.parametrize(
    ("name", "specs", "options"),
    [
        ("whole", SPECS, {"ratio": 1}),
        ("half", HALF, {"ratio": 0.5}),
        ("double", SPECS, {"ratio": 2}),
        ("linear", LINEAR, {"ratio": 1}),
        ("basis", HALF, {"ratio": 0.5, "basis": 0.5}),
    ],
)
def test_the_authors_code_computes_the_same(name: str, specs: list[ConvSpec], options: dict[str, Any]) -> None:
    """Random weights in their code and ours: `python -m benchmarks.agreement kernelwarehouse` wrote the file."""
    stored = load_file(DATA)
    layers = build(*specs, **options)
    x = stored["x"].flatten(2).mT if name == "linear" else stored["x"]
    for index, layer in enumerate(layers):
        prefix = f"{name}.{index}."
        state = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        del state["y"]
        assert torch.equal(layer.beta, state["beta"])
        layer.load_state_dict(state)
    for index, layer in enumerate(layers):
        expected = stored[f"{name}.{index}.y"]
        x = (TokenConv(layer) if name == "linear" else layer)(x)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_learns_from_the_cells_of_another() -> None:
    first, second = build(*SPECS[:2])
    first.anneal(1.0)
    first(torch.randn(2, 4, 5, 5)).sum().backward()
    assert second.cells.grad is not None and second.cells.grad.any()


# How it is cut


def resnet18() -> list[list[ConvSite]]:
    """Its stages as the authors cut them: a stage's strided layers go to the stage before."""

    def site(i: int, o: int, k: int, side: int) -> ConvSite:
        return ConvSite("c", ConvSpec(i, o, (k, k), padding=(k // 2,) * 2, bias=False), side * side)

    stages: list[list[ConvSite]] = [[site(64, 64, 3, 56)]]
    for c, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        stages[-1] += [site(c, c, 3, side) for _ in range(3)]
        if c < 512:
            stages[-1] += [site(c, 2 * c, 3, side // 2), site(c, 2 * c, 1, side // 2)]
            stages.append([])
    return stages


@pytest.mark.parametrize(
    ("ratio", "cell", "cells", "assembly"),
    [
        (1, 1.0, ["56x64x64", "47x128x128", "47x256x256", "27x512x512"], 385e6),
        (0.5, 0.5, ["112x32x32", "94x64x64", "94x128x128", "54x256x256"], 770e6),
        (4, 1.0, ["224x64x64", "188x128x128", "188x256x256", "108x512x512"], 1540e6),
    ],
)
def test_resnet18_has_the_warehouses_of_the_authors(ratio: float, cell: float, cells: list[str], assembly: int) -> None:
    """Numbers and shapes of cells that their constructors make of ResNet-18, and what mixing them costs."""
    method = KernelWarehouse(ratio=ratio, placement="all")
    stages = resnet18()
    found = []
    for stage in stages:
        (store,) = stored(stage, ratio, (cell, cell))
        found.append(f"{store.cells}x{store.out}x{store.into}")
    assert found == cells
    kernels = sum(macs.kernels for stage in stages for macs in method.macs(stage))
    assert kernels == pytest.approx(assembly, rel=0.003)


def sites(*shapes: tuple[int, int], kernel: int = 3, positions: int = 1024) -> list[ConvSite]:
    """Layers of (output, input) channels."""
    return [ConvSite("c", ConvSpec(i, o, (kernel, kernel)), positions) for o, i in shapes]


def shared(found: list[ConvSite], **options: Any) -> list[tuple[list[int], int, int, int]]:
    """Per warehouse: its layers, its cells, and their sides."""
    stores = KernelWarehouse(**options)._stores(found)
    return [(store.members, store.cells, store.out, store.into) for store in stores]


def test_widths_without_a_common_divisor_have_warehouses_of_their_own() -> None:
    """37 and 75 have a divisor of 1: 9 * (2 * 37 + 75) * 37 cells of 1x1; apart, each has 9, as wide as its kernel."""
    specs = [ConvSpec(37, o, (3, 3), padding=(1, 1)) for o in (37, 75, 37)]
    layers = build(*specs)
    assert [(layer.grid.pieces, layer.cells.shape) for layer in layers] == [
        (9, (9, 37, 37)), (9, (9, 75, 37)), (9, (9, 37, 37))
    ]  # fmt: skip
    assert layers[0].warehouse is layers[2].warehouse is not layers[1].warehouse
    assert [layer.first for layer in layers] == [0, 0, 9]
    for layer, conv in zip(layers, statics(*specs), strict=True):
        layer.load_static(conv.weight, conv.bias)
        x = torch.randn(2, 37, 3, 3)
        torch.testing.assert_close(layer(x), conv(x))


def test_layers_share_while_their_divisor_cuts_kernels_in_32_at_most() -> None:
    # A 3x3 kernel has 9 cells in space: 3 * 9 = 27 of it where a width is three times the divisor, 36 where four times.
    assert shared(sites((16, 16), (48, 16))) == [([0, 1], 9 + 27, 16, 16)]
    assert shared(sites((16, 16), (64, 16))) == [([0], 9, 16, 16), ([1], 9, 64, 16)]
    # A 1x1 kernel has one: 32 of 1x32, and 33 of 1x33.
    assert shared(sites((1, 1), (1, 32), kernel=1)) == [([0, 1], 33, 1, 1)]
    assert shared(sites((1, 1), (1, 33), kernel=1)) == [([0], 1, 1, 1), ([1], 4, 1, 9)]  # halved twice
    # A 7x7 kernel has 49, of its own width: more, but not for want of a divisor.
    assert shared(sites((8, 8), (8, 8), kernel=7)) == [([0, 1], 98, 8, 8)]
    # 18 and 32 have 2 in common, as 9 and 4 have 1; the odd one leaves the others as they are.
    assert shared(sites((32, 32), (32, 18), (18, 32), (32, 32))) == [
        ([0, 3], 18, 32, 32), ([1], 9, 32, 18), ([2], 9, 18, 32)
    ]  # fmt: skip


def test_by_default_layers_share_while_mixing_is_a_quarter_of_the_convolution() -> None:
    four = sites(*[(16, 16)] * 4, positions=72)
    assert [members for members, *_ in shared(four)] == [[0, 1], [2, 3]]  # 18 cells of 72 positions
    assert [members for members, *_ in shared(four, placement="all")] == [[0, 1, 2, 3]]
    assert [members for members, *_ in shared(four, ratio=2)] == [[0], [1], [2], [3]]  # 18 cells each
    for macs in KernelWarehouse().macs(four):
        assert macs.kernels / macs.conv == 18 / 72
    assert [members for members, *_ in shared([*four[:1], *sites((16, 16), positions=71)])] == [[0], [1]]


def test_a_warehouse_has_1024_cells_at_most() -> None:
    assert [count for _, count, *_ in shared(sites(*[(8, 8)] * 25, kernel=7), placement="all")] == [20 * 49, 5 * 49]


def test_a_warehouse_has_4_cells_at_least() -> None:
    """One, of a pointwise layer as a whole, could only be scaled; its longer side is halved first."""
    assert shared(sites((16, 64), kernel=1)) == [([0], 4, 16, 16)]
    assert shared(sites((37, 37), kernel=1)) == [([0], 4, 19, 19)]
    assert shared(sites((24, 16), (24, 16), kernel=1)) == [([0, 1], 4, 12, 16)]
    assert shared(sites((16, 16), kernel=1), ratio=4) == [([0], 4, 16, 16)]
    assert shared(sites((1, 1), kernel=1)) == [([0], 1, 1, 1)]
    (layer,), (conv,) = build(ConvSpec(37, 37, (1, 1))), statics(ConvSpec(37, 37, (1, 1)))
    layer.load_static(conv.weight, conv.bias)
    layer.anneal(1.0)
    x = torch.randn(2, 37, 3, 3)
    torch.testing.assert_close(layer(x), conv(x), rtol=2e-3, atol=2e-3)  # cells of 19 overhang the 37 by one
    layer(x).sum().backward()
    assert layer.router.bias.grad is not None and layer.router.bias.grad.abs().max() > 0.1


def test_an_odd_divisor_is_cut_in_two_and_not_in_three() -> None:
    """Half of 37 is 19, and the second cell overhangs by one; of 18 there would be three."""
    (store,) = stored(sites((37, 37)), 0.5, (0.5, 0.5))
    assert (store.out, store.into, store.grids[0].pieces) == (19, 19, 9 * 4)
    (store,) = stored(sites((30, 30), kernel=1), 0.5, (0.1, 0.1))  # 0.1 * 30 is 3, to rounding
    assert (store.out, store.into) == (3, 3)


def test_macs_and_parameters_of_layers_that_do_not_all_share() -> None:
    """9x16 between two of 16x16: as alone, and as the two."""
    method, found = KernelWarehouse(), sites((16, 16), (9, 16), (16, 16))
    pair, odd = [found[0], found[2]], [found[1]]
    assert method.macs(found) == [method.macs(pair)[0], method.macs(odd)[0], method.macs(pair)[1]]
    assert method.params(found) == [method.params(pair)[0], method.params(odd)[0], method.params(pair)[1]]
    built = [sum(p.numel() for p in layer.parameters()) for layer in method.build(found)]
    assert built == method.params(found)
    shipped = WarehouseConv.shipped(method.build(found))
    assert shipped[0].cells is shipped[2].cells is not shipped[1].cells
    assert shipped[0].cells.shape == (18, 256) and shipped[1].cells.shape == (9, 144)


# The warm start and the schedule


def test_stays_at_the_static_network_while_tau_falls() -> None:
    layers, convs = build(*SPECS, ratio=2), statics(*SPECS)
    x = torch.randn(2, 4, 6, 6)
    for layer, conv in zip(layers, convs, strict=True):
        layer.load_static(conv.weight, None)
        for progress, error in ((0.0, 1e-6), (1 / 30, 1e-3), (1.0, 1.01e-3)):
            layer.anneal(progress)
            y = conv(x)
            assert (layer(x) - y).abs().max() <= error * y.abs().max()
        x = y


@pytest.mark.parametrize("ratio", [1 / 2, 1 / 4])
def test_below_one_it_starts_at_the_best_rank(ratio: float) -> None:
    """The error is that of the singular values that there is no cell for (Eckart, Young)."""
    (conv,), (layer,) = statics(SPECS[0]), build(SPECS[0], ratio=ratio, cell=0.5)
    weight = conv.weight.detach()
    layer.load_static(weight, None)
    kernel = layer.assemble(layer.coefficients(torch.randn(1, 4, 4, 4)), layer.cells.flatten(1))[0]
    # 16 cells of 2 x 2 in space-major order
    pieces = weight.reshape(2, 2, 2, 2, 4).permute(4, 0, 2, 1, 3).reshape(16, 4)
    left_out = torch.linalg.svdvals(pieces)[len(layer.cells) :]
    assert len(layer.cells) == 16 * ratio
    assert (kernel - weight).square().sum().item() == pytest.approx(left_out.square().sum().item(), rel=1e-3, abs=1e-6)


def test_tau_falls_linearly_and_never_rises() -> None:
    (layer,) = build(SPECS[0], warmup=0.5)
    seen = []
    for progress in (0.0, 0.125, 0.25, 0.0, 0.5, 1.0, 0.0):
        layer.anneal(progress)
        seen.append(layer.tau.item())
    assert seen == [1.0, 0.75, 0.5, 0.5, 0.0, 0.0, 0.0]
    assert build(SPECS[0], warmup=0)[0].tau == 0


def test_while_tau_is_one_the_input_does_not_matter() -> None:
    (layer,) = build(SPECS[0])
    a, b = layer.coefficients(torch.randn(2, 4, 4, 4))
    assert torch.equal(a, b) and torch.equal(a, layer.beta[:, :-1])


def test_a_copy_has_a_warehouse_of_its_own() -> None:
    net = nn.Sequential(*build(*SPECS))
    other = copy.deepcopy(net)
    assert other[0].warehouse is other[1].warehouse is not net[0].warehouse
    assert sum(1 for _ in net.parameters()) == 3 * 7  # no layer's parameters are another's, too


# Costs and errors


def test_macs_by_hand() -> None:
    found = [ConvSite("a", SPECS[0], 25), ConvSite("c", SPECS[2], 25)]
    # Cells of 4x4: 4 in the 2x2 kernel, 1 x 2 in the 1x1 of 8 inputs; 6 in all, 7 coefficients per cell.
    together = KernelWarehouse(placement="all")
    assert together.macs(found) == [
        Macs(conv=64 * 25, kernels=4 * 6 * 16, router=4 * 16 + 16 * 4 * 7),
        Macs(conv=32 * 25, kernels=2 * 6 * 16, router=8 * 16 + 16 * 2 * 7),
    ]
    # With a basis of 16: 4 and 2 coefficients of their own, 16 of the basis and that of zeros; 2 and 4 of others.
    assert [macs.router for macs in replace(together, basis=0.5).macs(found)] == [
        4 * 16 + 4 * (16 * (4 + 16 + 1) + 16 * 2), 8 * 16 + 2 * (16 * (2 + 16 + 1) + 16 * 4)
    ]  # fmt: skip


def test_a_batchnorm_and_the_warehouse_are_part_of_what_is_shipped() -> None:
    layers = build(*SPECS)
    for parameter in nn.Sequential(*layers).parameters():
        nn.init.normal_(parameter, std=0.3)
    scale, shift, x = torch.randn(4), torch.randn(4), torch.randn(3, 4, 5, 5)
    y = layers[0](x)
    assert layers[0].absorb(scale, shift)
    expected = y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(layers[0](x), expected)
    shipped = WarehouseConv.shipped(layers)
    torch.testing.assert_close(shipped[0](x), expected)
    assert shipped[0].cells is shipped[2].cells and layers[0].cells is not layers[2].cells


def test_depthwise_stays_static() -> None:
    placed, reason = KernelWarehouse().place(ConvSite("c", ConvSpec(8, 8, (3, 3), groups=8), 25))
    assert placed == Static() and "depthwise, 72 weights" in reason
    classifier = ConvSite("fc", ConvSpec(8, 10, (1,)), 1)
    assert KernelWarehouse().place(classifier)[0] == Static()
    everywhere = KernelWarehouse(placement="all")
    assert everywhere.place(classifier) == (everywhere, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.3}, "ratio 0.3 gives layers no whole numbers of cells: give 1 to 8, or 1/2 to 1/8"),
        ({"ratio": "1"}, "ratio '1'"),
        ({"cell": 0}, "cell 0 is no width of a cell"),
        ({"cell_in": 2}, "cell_in 2 is no width of a cell"),
        ({"basis": 0}, "basis 0 is no part between 0 and 1: give one of the cells of other layers"),
        ({"reduction": True}, "reduction True is no part between 0 and 1"),
        ({"placement": "some"}, "placement 'some' is unknown"),
        ({"warmup": -1}, "warmup -1 is no part of the training"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DynCompressError, match=words):
        KernelWarehouse(**options)
