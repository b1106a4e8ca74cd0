"""Even-sized kernels: the paper's four pads, another way to compute them, the closest start, what they cost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError
from dyncompress.layers import C2sp, ConvSite, ConvSpec, Macs, Static, load_static
from dyncompress.layers.c2sp import EvenConv
from dyncompress.layers.dynet import DyNetConv

SPEC = ConvSpec(8, 6, (3, 3), padding=(1, 1))


def build(spec: ConvSpec = SPEC, g: int = 1) -> EvenConv:
    (layer,) = C2sp(g=g).build([ConvSite("conv", spec, positions=36)])
    assert isinstance(layer, EvenConv)
    return layer


def test_each_quarter_is_padded_at_the_papers_corner() -> None:
    """Six channels: two, two, one and one. Zeros at bottom right, top left, bottom left, top right."""
    layer = build(ConvSpec(6, 4, (3, 3), padding=(1, 1)))
    x = torch.randn(2, 6, 5, 5)
    pads = [(0, 1, 0, 1)] * 2 + [(1, 0, 1, 0)] * 2 + [(1, 0, 0, 1), (0, 1, 1, 0)]  # left, right, top, bottom
    padded = torch.cat([F.pad(x[:, [c]], pad) for c, pad in enumerate(pads)], 1)
    assert padded.shape == (2, 6, 6, 6)
    torch.testing.assert_close(layer(x), F.conv2d(padded, layer.conv.weight, layer.conv.bias))


def embedded(layer: EvenConv) -> Tensor:
    """The odd kernels that compute the same, with zeros where a tap fell away."""
    spec = layer.spec
    even: Any = layer.conv.weight
    weight = torch.zeros(spec.weight_shape)
    shrunk = [d for d, k in enumerate(spec.kernel_size) if k % 2 and k > 1]
    corners = {1: [(1,), (0,)], 2: [(1, 1), (0, 0), (1, 0), (0, 1)]}.get(len(shrunk))
    if corners is None:
        corners = [(1, 1, 1), (0, 0, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]
    sizes = [len(part) for part in torch.arange(spec.in_channels).tensor_split(len(corners))]
    owner = list(itertools.chain(*([c] * n for c, n in zip(corners, sizes, strict=True))))
    inputs, outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    for group in range(spec.groups):
        for i in range(inputs):
            late = dict(zip(shrunk, owner[group * inputs + i], strict=True))
            place = tuple(
                slice(late.get(d, 0), late.get(d, 0) + even.shape[2 + d]) for d in range(len(spec.kernel_size))
            )
            rows = slice(group * outputs, (group + 1) * outputs)
            weight[(rows, i, *place)] = even[rows, i]
    return weight


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ConvSpec(8, 4, (3, 3), stride=(2, 2), padding=(1, 1), bias=False),
        ConvSpec(6, 6, (5, 5), padding=(2, 2), groups=6),
        ConvSpec(8, 4, (3, 5), padding="same", dilation=(2, 1), groups=2, padding_mode="reflect"),
        ConvSpec(4, 4, (1, 3), padding=(0, 0), bias=False),
        ConvSpec(5, 3, (3,), stride=(2,), padding=(2,), padding_mode="circular"),
        ConvSpec(9, 2, (3, 3, 3), padding=(1, 1, 1)),
    ],
    ids=str,
)
def test_it_is_an_odd_convolution_with_zeros_in_its_kernel(spec: ConvSpec) -> None:
    layer = build(spec)
    x = torch.randn(2, spec.in_channels, *(7, 8, 6)[: spec.ndim])
    (conv,) = Static().build([ConvSite("conv", spec, positions=1)])
    load_static(conv, embedded(layer), layer.conv.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_the_picture_does_not_move() -> None:
    """Twenty layers of means over four neighbours leave the centre of mass of a dot where it was."""
    layer = build(ConvSpec(4, 4, (3, 3), padding=(1, 1), bias=False))
    nn.init.constant_(layer.conv.weight, 1 / 16)  # type: ignore[arg-type]
    x = torch.zeros(1, 4, 61, 61)
    x[:, :, 30, 30] = 1
    for _ in range(20):
        x = layer(x)
    mass = x.sum((0, 1))
    place = torch.arange(61.0)
    centre = [(mass.sum(d) @ place / mass.sum()).item() for d in (0, 1)]
    assert centre == pytest.approx([30, 30], abs=1e-3)


def test_the_start_is_the_least_squares_solution() -> None:
    """Of inputs whose products of neighbours are 0.66 of their squares, and 0.66^n at a distance of n."""
    spec = ConvSpec(1, 3, (3, 3), padding=(1, 1), bias=False)  # one channel: the later two taps of each dimension
    (conv,), layer = Static().build([ConvSite("conv", spec, positions=1)]), build(spec)
    weight: Tensor = conv.weight.detach().double()  # type: ignore[operator,union-attr,assignment]
    layer.load_static(weight, None)
    taps = torch.arange(3)
    products = 0.66 ** (taps[:, None] - taps).abs().double()
    covariance = torch.kron(products, products)
    kept = [4, 5, 7, 8]
    best = torch.linalg.solve(covariance[kept][:, kept], covariance[kept] @ weight.reshape(3, 9).T).T
    torch.testing.assert_close(layer.conv.weight.detach().reshape(3, 4).double(), best, rtol=1e-5, atol=1e-6)  # type: ignore


def test_a_bank_of_even_kernels_starts_like_a_single_one() -> None:
    (conv,) = Static().build([ConvSite("conv", SPEC, positions=1)])
    one, many = build(), build(g=3)
    assert isinstance(many.conv, DyNetConv) and many.conv.bank.shape == (6, 3, 8, 2, 2)
    spare = torch.randn(4, 8, 3, 3)
    for layer in (one, many):
        layer.load_static(conv.weight.detach(), conv.bias.detach(), spare=spare)  # type: ignore
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(one(x), many(x), rtol=1e-4, atol=1e-5)


def test_costs_four_ninths() -> None:
    site = ConvSite("conv", SPEC, positions=36)
    assert C2sp().macs([site]) == [Macs(conv=8 * 6 * 4 * 36)]
    assert C2sp().params([site]) == [8 * 6 * 4 + 6]
    assert C2sp(g=2).macs([site]) == [Macs(conv=6912, kernels=2 * 192, router=8 * 6 * 2)]


def test_nothing_to_shrink_stays_static() -> None:
    for kernel in ((1, 1), (2, 2), (4, 4)):
        assert C2sp().place(ConvSite("conv", ConvSpec(8, 8, kernel), 36))[0] == Static()
    assert C2sp().place(ConvSite("conv", ConvSpec(8, 8, (1, 3)), 36)) == (C2sp(), "")


@pytest.mark.parametrize("g", [0, 2000, "2", True])
def test_an_impossible_number_of_kernels_is_refused(g: Any) -> None:
    with pytest.raises(DynCompressError, match=r"is no number of kernels: give 1 \(static kernels\) to 1024"):
        C2sp(g=g)
