"""CondConv: its equation by hand, where it is placed and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError
from dyncompress.layers import CondConv, ConvSite, ConvSpec, Macs, Static
from dyncompress.layers.condconv import CondConvLayer
from tests.layers import published

SPEC = ConvSpec(8, 12, (3, 3), padding=(1, 1))


def layer(spec: ConvSpec = SPEC, experts: int = 4) -> CondConvLayer:
    (built,) = CondConv(experts).build([ConvSite("conv", spec, positions=64)])
    assert isinstance(built, CondConvLayer)
    return built


def test_one_channel_by_hand() -> None:
    conv = layer(ConvSpec(1, 1, (1, 1)), experts=2)
    with torch.no_grad():
        conv.bank.copy_(torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1, 1, 1))
        conv.bias.copy_(torch.tensor([0.5]))  # type: ignore[union-attr]
        conv.router.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        conv.router.bias.copy_(torch.tensor([0.0, math.log(3)]))
    # Pixels 1 and 3 have the mean 2: alpha = sigmoid(2), sigmoid(log 3 - 2); the bias is not mixed.
    kernel = 1 / (1 + math.exp(-2)) + 10 / (1 + math.exp(2 - math.log(3)))
    result = conv(torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2)).flatten().tolist()
    assert result == pytest.approx([0.5 + kernel, 0.5 + 3 * kernel])


@pytest.mark.parametrize("spec", [SPEC, ConvSpec(8, 12, (3, 3), stride=(2, 2), groups=4, bias=False)], ids=str)
def test_equation_sample_by_sample(spec: ConvSpec) -> None:
    conv = layer(spec, experts=3).double()
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    for sample, result in zip(x, conv(x), strict=True):
        alpha = torch.sigmoid(conv.router.weight @ sample.mean((1, 2)) + conv.router.bias)
        kernel = sum(a * w for a, w in zip(alpha, conv.bank[0], strict=True))
        padding = spec.padding
        assert not isinstance(padding, str)
        expected = F.conv2d(sample.unsqueeze(0), kernel, conv.bias, spec.stride, padding, 1, spec.groups)[0]
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_equals_timm() -> None:
    conv = layer(ConvSpec(8, 12, (3, 3), (2, 2), (1, 1), groups=4, bias=False), experts=4)
    published.assert_equal("condconv", "grouped", conv)


def test_experts_are_told_apart_from_the_first_step_on() -> None:
    conv, weight = layer(), torch.randn(SPEC.weight_shape)
    conv.load_static(weight, torch.zeros(12))
    kernels = conv.bank.flatten(2)[0]
    assert (torch.cdist(kernels, kernels) + torch.eye(4) > 0.05 * weight.std()).all()
    conv(torch.randn(2, 8, 5, 5)).square().sum().backward()
    gradient = conv.router.weight.grad
    assert gradient is not None and torch.cdist(gradient, gradient).add(torch.eye(4)).min() > 0


def test_placement_is_that_of_a_bank() -> None:
    small = ConvSpec(32, 32, (3, 3))
    placed = [CondConv(4).place(ConvSite("conv", small, positions))[0] for positions in (64, 63, 31)]
    assert placed == [CondConv(4), CondConv(2), Static()]
    method, reason = CondConv(4).place(ConvSite("conv", ConvSpec(8, 8, (3, 3), groups=8), 3136))
    assert method == Static() and "depthwise, 72 weights" in reason
    assert CondConv(4, placement="all").place(ConvSite("conv", small, 1)) == (CondConv(4, placement="all"), "")


def test_cost_by_hand() -> None:
    site = ConvSite("conv", ConvSpec(64, 128, (3, 3), stride=(2, 2)), positions=784)
    # P = 128 * 64 * 9 = 73,728; a router of 64 weights per expert.
    assert CondConv(4).macs([site]) == [Macs(73_728 * 784, 4 * 73_728, 64 * 4)]
    assert CondConv(4).params([site]) == [4 * 73_728 + 128 + 65 * 4]


@pytest.mark.parametrize("options", [{"experts": 0}, {"experts": 2.0}, {"placement": "none"}], ids=str)
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(DynCompressError, match=f"^{next(iter(options))} "):
        CondConv(**options)  # type: ignore[arg-type]


def test_repr_says_what_it_is() -> None:
    assert "condconv, 8 -> 12, 3x3, padding 1, experts=4" in repr(layer())
