"""KernelWarehouse: its equations by hand, its authors' numbers, its warm start, its schedule, what it costs."""

from __future__ import annotations

import copy
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
    layers = KernelWarehouse(**options).build([ConvSite("conv", spec, positions=25) for spec in specs])
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
    method = KernelWarehouse(ratio=ratio)
    stages = resnet18()
    found = []
    for sites in stages:
        store = stored(sites, ratio, (cell, cell))
        found.append(f"{store.cells}x{store.out}x{store.into}")
    assert found == cells
    kernels = sum(macs.kernels for sites in stages for macs in method.macs(sites))
    assert kernels == pytest.approx(assembly, rel=0.003)


def test_widths_without_a_common_divisor_get_cells_that_overhang() -> None:
    """37 and 75: 3 cells of 37 along the 75, of which the last overhangs; by their divisor they had 2,775 of 1x1."""
    specs = [ConvSpec(37, 37, (1, 1)), ConvSpec(37, 75, (1, 1))]
    a, b = build(*specs)
    assert (a.grid, b.grid) == ((1, 1, 1), (1, 3, 1))
    assert a.cells.shape[1:] == b.cells.shape[1:] == (37, 37)
    for layer, conv in zip((a, b), statics(*specs), strict=True):
        layer.load_static(conv.weight, conv.bias)
        x = torch.randn(2, 37, 3, 3)
        torch.testing.assert_close(layer(x), conv(x))


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
    sites = [ConvSite("a", SPECS[0], 25), ConvSite("c", SPECS[2], 25)]
    # Cells of 4x4: 4 in the 2x2 kernel, 1 x 2 in the 1x1 of 8 inputs; 6 in all, 7 coefficients per cell.
    assert KernelWarehouse().macs(sites) == [
        Macs(conv=64 * 25, kernels=4 * 6 * 16, router=4 * 16 + 16 * 4 * 7),
        Macs(conv=32 * 25, kernels=2 * 6 * 16, router=8 * 16 + 16 * 2 * 7),
    ]
    # With a basis of 16: 4 and 2 coefficients of their own, 16 of the basis and that of zeros; 2 and 4 of others.
    assert [macs.router for macs in KernelWarehouse(basis=0.5).macs(sites)] == [
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
