"""DY-CNN: its equation by hand, its biases, where it is placed and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, DyConv, Macs, Static
from dyncompress.layers.dyconv import DyConvLayer

SPEC = ConvSpec(8, 12, (3, 3), padding=(1, 1))


def layer(spec: ConvSpec = SPEC, **options: Any) -> DyConvLayer:
    (built,) = DyConv(**options).build([ConvSite("conv", spec, positions=64)])
    assert isinstance(built, DyConvLayer)
    return built


def test_one_channel_by_hand() -> None:
    conv = layer(ConvSpec(1, 1, (1, 1)), kernels=2)
    with torch.no_grad():
        conv.bank.copy_(torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1, 1, 1))
        conv.bias.copy_(torch.tensor([[4.0], [8.0]]))  # type: ignore[union-attr]
        nn.init.zeros_(conv.router.weight)
        conv.router.bias.copy_(torch.tensor([0.0, 2 * math.log(3)]))
    conv.temperature.value.fill_(2.0)
    # softmax(0, log 3) = 1/4, 3/4: a kernel of 7.75 and a bias of 7
    assert conv(torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2)).flatten().tolist() == pytest.approx([14.75, 30.25])


@pytest.mark.parametrize("spec", [SPEC, ConvSpec(8, 12, (3, 3), stride=(2, 2), groups=4, bias=False)], ids=str)
def test_equation_sample_by_sample(spec: ConvSpec) -> None:
    conv = layer(spec, kernels=3).double()
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    conv.anneal(0.09)
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    reduce: Any = conv.squeeze.reduce
    for sample, result in zip(x, conv(x), strict=True):
        hidden = F.relu(reduce.weight @ sample.mean((1, 2)) + reduce.bias)
        pi = torch.softmax((conv.router.weight @ hidden + conv.router.bias) / 3.9, 0)  # 30 - 0.9 * 29
        kernel = sum(p * w for p, w in zip(pi, conv.bank[0], strict=True))
        bias = None if conv.bias is None else pi @ conv.bias
        padding = spec.padding
        assert not isinstance(padding, str)
        expected = F.conv2d(sample.unsqueeze(0), kernel, bias, spec.stride, padding, 1, spec.groups)[0]
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_absorbs_an_affine_map(bias: bool) -> None:
    """Coefficients sum to one, so that a shift may be part of every kernel's bias."""
    conv, x = layer(ConvSpec(8, 12, (3, 3), bias=bias)), torch.randn(3, 8, 6, 6)
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    scale, shift = torch.randn(12), torch.randn(12)
    expected = conv(x) * scale[:, None, None] + shift[:, None, None]
    conv.absorb(scale, shift)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)


def test_placement_is_that_of_a_bank() -> None:
    small = ConvSpec(32, 32, (3, 3))
    placed = [DyConv().place(ConvSite("conv", small, positions))[0] for positions in (64, 63, 31)]
    assert placed == [DyConv(), DyConv(kernels=2), Static()]
    everywhere = DyConv(placement="all")
    assert everywhere.place(ConvSite("conv", small, 1)) == (everywhere, "")


def test_cost_by_hand() -> None:
    spec = ConvSpec(64, 128, (3, 3))
    # P = 128 * 64 * 9 = 73,728; 64 / 4 = 16 hidden units, 4 outputs; a bias is 128 more weights of each kernel
    for bias in (0, 1):
        site = ConvSite("conv", ConvSpec(64, 128, spec.kernel_size, bias=bool(bias)), positions=784)
        assert DyConv().macs([site]) == [Macs(73_728 * 784, 4 * (73_728 + 128 * bias), 16 * (64 + 4))]
        assert DyConv().params([site]) == [4 * (73_728 + 128 * bias) + 65 * 16 + 17 * 4]
    # at least 8 hidden units
    assert DyConv(reduction=32).macs([ConvSite("conv", spec, 784)])[0].router == 8 * 68


@pytest.mark.parametrize("options", [{"kernels": 0}, {"reduction": 0}, {"placement": "none"}], ids=str)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DynCompressError, match=f"^{next(iter(options))} "):
        DyConv(**options)


def test_repr_says_what_it_is() -> None:
    assert "dyconv, 8 -> 12, 3x3, padding 1, kernels=4" in repr(layer())
