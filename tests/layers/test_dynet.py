"""DyNet: its equations by hand, its coefficients, where it is placed and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, DyNet, Macs, Static
from dyncompress.layers.dynet import DyNetConv

SPEC = ConvSpec(8, 12, (3, 3), padding=(1, 1))
GROUPED = ConvSpec(8, 12, (3, 3), padding=(1, 1), groups=4, bias=False)
DEPTHWISE = ConvSpec(8, 8, (3, 3), padding=(1, 1), groups=8)


def layer(spec: ConvSpec = SPEC, **options: Any) -> DyNetConv:
    (built,) = DyNet(**options).build([ConvSite("conv", spec, positions=64)])
    assert isinstance(built, DyNetConv)
    return built


def convolve(x: Tensor, spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Tensor:
    (conv,) = Static().build([ConvSite("conv", spec, positions=64)])
    return torch.func.functional_call(conv, {"weight": weight} | ({} if bias is None else {"bias": bias}), x)


# The forward pass


def test_one_channel_by_hand() -> None:
    conv = layer(ConvSpec(1, 1, (1, 1)), g=2)
    with torch.no_grad():
        conv.bank.copy_(torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1, 1))
        conv.bias.copy_(torch.tensor([0.5]))  # type: ignore[union-attr]
        conv.router.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        conv.router.bias.copy_(torch.tensor([0.0, math.log(3)]))
    # Pixels 1 and 3 have the mean 2: eta = sigmoid(2), sigmoid(log 3 - 2); the bias is not mixed.
    kernel = 1 / (1 + math.exp(-2)) + 10 / (1 + math.exp(2 - math.log(3)))
    result = conv(torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2)).flatten().tolist()
    assert result == pytest.approx([0.5 + kernel, 0.5 + 3 * kernel])


@pytest.mark.parametrize("router", ["block", "layer"])
@pytest.mark.parametrize("reduction", [0, 2])
def test_a_block_by_the_equations(router: Any, reduction: int) -> None:
    """Equations of the paper, sample by sample and channel by channel, in fp64."""
    specs = [ConvSpec(20, 6, (3, 3), padding=(1, 1)), ConvSpec(6, 4, (1, 1), bias=False)]
    method = DyNet(g=3, router=router, reduction=reduction)
    net = nn.Sequential(*method.build([ConvSite("conv", spec, positions=25) for spec in specs])).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 20, 5, 5, dtype=torch.float64)

    def squeeze(features: Tensor, conv: nn.Module) -> Tensor:
        mean = features.flatten(1).mean(1)
        return F.relu(conv.squeeze.reduce.weight @ mean + conv.squeeze.reduce.bias) if reduction else mean  # type: ignore

    for sample, result in zip(x, net(x), strict=True):
        features, seen = sample, None
        for conv, spec in zip(net, specs, strict=True):
            if seen is None or router == "layer":
                seen = squeeze(features, conv)
            eta = torch.sigmoid(conv.router.weight @ seen + conv.router.bias)
            kernels = [sum(eta[3 * t + i] * conv.bank[t, i] for i in range(3)) for t in range(spec.out_channels)]
            features = convolve(features.unsqueeze(0), spec, torch.stack(kernels), conv.bias)[0]  # type: ignore
        torch.testing.assert_close(features, result, rtol=1e-12, atol=1e-12)


def test_learns_what_no_static_convolution_can() -> None:
    """y = x where an image is bright, -x where it is dark: a kernel that depends on the image, and no other way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 4, 4, generator=generator) + torch.tensor([2.0, -2.0]).repeat(32).reshape(64, 1, 1, 1)
    y = x * x.mean((1, 2, 3), keepdim=True).sign()

    def loss(conv: nn.Module) -> Tensor:
        return F.mse_loss(conv(x), y)

    losses = {}
    for method in (Static(), DyNet(g=2)):
        (conv,) = method.build([ConvSite("conv", ConvSpec(1, 1, (1, 1)), positions=16)])
        optimizer = torch.optim.Adam(conv.parameters(), lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            loss(conv).backward()
            optimizer.step()
        losses[method.name] = loss(conv).item()
    assert losses["dynet"] < 0.1 * losses["static"]


def test_starts_from_scratch_with_the_scale_of_a_static_convolution() -> None:
    spec = ConvSpec(64, 64, (3, 3))
    x = torch.randn(4, 64, 8, 8)
    static = nn.Conv2d(64, 64, 3)(x).std()
    for g in (2, 4, 6):
        assert layer(spec, g=g)(x).std().item() == pytest.approx(static.item(), rel=0.1)


# Coefficients


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_coefficients_are_fp32_at_least(dtype: str, expected: str) -> None:
    conv, x = layer().to(getattr(torch, dtype)), torch.randn(2, 8, 6, 6).to(getattr(torch, dtype))
    nn.init.normal_(conv.router.weight)
    reference = conv.double().coefficients(x.double())
    eta = conv.to(getattr(torch, dtype)).coefficients(x)
    assert eta.dtype == getattr(torch, expected)
    assert eta.shape == (2, 12, 4)
    # From the same bf16 numbers: arithmetic in bf16 would be off by 2^-9 at least somewhere among 96 coefficients.
    torch.testing.assert_close(eta.double(), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reduction", [0, 2])
def test_coefficients_do_not_feel_autocast(reduction: int) -> None:
    conv, x = layer(reduction=reduction), torch.randn(2, 8, 6, 6)
    nn.init.normal_(conv.router.weight)
    with torch.autocast("cpu", torch.bfloat16):
        eta = conv.coefficients(x)
    assert torch.equal(eta, conv.coefficients(x))


# Where it is placed


def placed(method: DyNet, positions: int, spec: ConvSpec = SPEC) -> tuple[Any, str]:
    return method.place(ConvSite("conv", spec, positions))


CACHED = ConvSpec(32, 32, (3, 3))  # 9,216 weights: a bank of four has 147 kB
STREAMED = ConvSpec(256, 256, (3, 3))  # 589,824 weights: a bank of four has 9.4 MB


@pytest.mark.parametrize(
    ("spec", "g", "positions", "expected"),
    [
        (CACHED, 4, 64, DyNet(4)),  # 16 positions per kernel
        (CACHED, 4, 63, DyNet(2)),
        (CACHED, 4, 32, DyNet(2)),
        (CACHED, 4, 31, Static()),  # 1 kernel is no bank
        (CACHED, 6, 95, DyNet(3)),
        (CACHED, 6, 96, DyNet(6)),
        (CACHED, 6, 47, Static()),  # 6 -> 3 -> 1
        (CACHED, 1, 3136, Static()),
        (STREAMED, 4, 224, DyNet(4)),  # 56 positions per kernel
        (STREAMED, 4, 196, DyNet(2)),
        (STREAMED, 4, 112, DyNet(2)),
        (STREAMED, 4, 49, Static()),
    ],
)
def test_mixing_stays_within_a_fifth_of_the_time_of_the_convolution(
    spec: ConvSpec, g: int, positions: int, expected: Any
) -> None:
    method, reason = placed(DyNet(g), positions, spec)
    assert method == expected
    assert bool(reason) == (method != DyNet(g))


def test_a_smaller_bank_keeps_the_other_options() -> None:
    method, _ = placed(DyNet(4, router="layer", reduction=4), 49, CACHED)
    assert method == DyNet(2, router="layer", reduction=4)


def test_reasons_give_the_numbers() -> None:
    assert placed(DyNet(4), 49, CACHED)[1] == (
        "g 4 -> 2: mixing 0.1 MB of kernels, cached, takes 26 % of the conv (49 positions), above 20 %"
    )
    assert placed(DyNet(4), 49, STREAMED)[1] == (
        "static: mixing 9.4 MB of kernels, from memory, takes 91 % of the conv (49 positions), above 20 %"
    )
    assert "depthwise, 72 weights" in placed(DyNet(4), 196, DEPTHWISE)[1]
    assert placed(DyNet(4), 9, ConvSpec(16, 16, (3, 3)))[1].startswith("static: tiny, 20,736 multiply-adds")


@pytest.mark.parametrize(("channels", "hidden"), [(64, 0), (65, 16), (256, 64)])
def test_a_large_router_gets_a_hidden_layer(channels: int, hidden: int) -> None:
    """64 channels times 64 outputs of 4 kernels each, four layers: 65,536 weights, the most of one linear layer."""
    sites = [ConvSite(str(i), ConvSpec(channels, 64, (1, 1)), 3136) for i in range(4)]
    owner = DyNet(4).build(sites)[0]
    assert (owner.squeeze.reduce.out_features if owner.squeeze.reduce else 0) == hidden
    assert [sum(p.numel() for p in layer.parameters()) for layer in DyNet(4).build(sites)] == DyNet(4).params(sites)


def test_depthwise_stays_static_unless_told_otherwise() -> None:
    assert placed(DyNet(4), 3136, DEPTHWISE)[0] == Static()
    assert placed(DyNet(4), 3136, GROUPED)[0] == DyNet(4)
    everywhere = DyNet(4, placement="all")
    assert placed(everywhere, 3136, DEPTHWISE) == (everywhere, "")
    assert placed(everywhere, 1) == (everywhere, "")
    assert placed(DyNet(1, placement="all"), 3136)[0] == Static()


@pytest.mark.parametrize(
    "options",
    [{"g": 0}, {"g": "4"}, {"router": "net"}, {"reduction": -1}, {"reduction": 0.5}, {"placement": "none"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DynCompressError, match=f"^{next(iter(options))} "):
        DyNet(**options)


# What it costs


def test_macs_by_hand() -> None:
    sites = [
        ConvSite("conv1", ConvSpec(64, 128, (3, 3), stride=(2, 2)), positions=784),
        ConvSite("conv2", ConvSpec(128, 128, (3, 3), groups=2), positions=784),
    ]
    # conv1: P = 128 * 64 * 9 = 73,728; conv2: P = 128 * 64 * 9 as well, with 64 channels in each of its 2 groups.
    conv, kernels = 73_728 * 784, 4 * 73_728
    # The router reads conv1's 64 channels for both layers.
    assert DyNet(4).macs(sites) == 2 * [Macs(conv, kernels, 64 * 128 * 4)]
    assert DyNet(4, router="layer").macs(sites) == [Macs(conv, kernels, 64 * 512), Macs(conv, kernels, 128 * 512)]
    # 64 / 4 = 16 hidden units, whose 64 * 16 MACs conv1 pays; without sharing conv2 has 32 of its own.
    assert DyNet(4, reduction=4).macs(sites) == [
        Macs(conv, kernels, 16 * 512 + 64 * 16),
        Macs(conv, kernels, 16 * 512),
    ]
    assert DyNet(4, router="layer", reduction=4).macs(sites)[1].router == 32 * 512 + 128 * 32
    # At least 8 hidden units: 64 / 16 = 4 would be fewer.
    assert DyNet(4, reduction=16).macs(sites)[1].router == 8 * 512


def test_params_by_hand() -> None:
    sites = [
        ConvSite("conv1", ConvSpec(64, 128, (3, 3)), 784),
        ConvSite("conv2", ConvSpec(128, 32, (1, 1), bias=False), 784),
    ]
    # bank + bias + router with its own bias per coefficient.
    assert DyNet(4).params(sites) == [4 * 73_728 + 128 + 65 * 512, 4 * 4096 + 65 * 128]
    assert DyNet(4, reduction=4).params(sites) == [4 * 73_728 + 128 + 17 * 512 + 65 * 16, 4 * 4096 + 17 * 128]


def test_no_site_costs_and_builds_nothing() -> None:
    for method in (DyNet(), DyNet(router="layer")):
        assert method.macs([]) == method.params([]) == method.build([]) == []


# The rest


@pytest.mark.parametrize("shape", [(8, 6, 6), (2, 4, 6, 6), (2, 8, 6)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DynCompressError, match=r"input has shape .*takes a batch of 8 channels and 2 spatial"):
        layer()(torch.zeros(shape))


def test_repr_says_what_it_is() -> None:
    net = nn.Sequential(*DyNet(g=3).build([ConvSite("a", SPEC, 64), ConvSite("b", ConvSpec(12, 8, (1, 1)), 64)]))
    assert "dynet, 8 -> 12, 3x3, padding 1, g=3, routed by its own input" in repr(net[0])
    assert "dynet, 12 -> 8, 1x1, g=3, routed by its block's input" in repr(net[1])
