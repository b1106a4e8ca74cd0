"""The shipped form of dynamic layers: the same numbers, one router per block, kernels that can be kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import networks
from dyncompress.conversion import convert
from dyncompress.errors import CheckpointError, DynCompressError
from dyncompress.folding import fold
from dyncompress.layers import ConvSite, ConvSpec, DynamicConv, DyNet, Method, ODConv
from dyncompress.layers.inference import BlockRouter, ScaledConv, ShippedConv, reuse_kernels
from dyncompress.planning import make_plan

BLOCK = [
    ConvSpec(12, 16, (3, 3), padding=(1, 1)),
    ConvSpec(16, 24, (1, 1)),
    ConvSpec(24, 12, (1, 1), bias=False),
    ConvSpec(12, 12, (3, 3), padding="same", padding_mode="reflect", groups=12),
    ConvSpec(12, 8, (2, 2), stride=(2, 2)),
]


ATTENTION = ODConv(spatial=False, placement="all")


def block(method: Method) -> list[nn.Module]:
    """Layers of one block with routers that matter, in double precision."""
    torch.manual_seed(0)
    layers = method.build([ConvSite(f"conv{i}", spec, 64) for i, spec in enumerate(BLOCK)])
    for layer in layers:
        nn.init.normal_(layer.router.weight)
        nn.init.normal_(layer.router.bias)
    return [layer.double().eval() for layer in layers]


def through(layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def shipped(layers: list[nn.Module]) -> list[nn.Module]:
    return type(layers[0]).shipped(layers)


@pytest.mark.parametrize("g", [2, 4, 64])  # few products and many: kernels are mixed in two ways
@pytest.mark.parametrize("reduction", [0, 2])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_shipped_block_computes_the_same(g, reduction, batch):
    layers = block(DyNet(g, reduction=reduction, placement="all"))
    x = torch.randn(batch, 12, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected, found = through(layers, x), through(shipped(layers), x)
    assert expected.shape == (batch, 8, 4, 4)
    assert torch.allclose(expected, found, rtol=1e-10, atol=1e-12)


def test_layers_with_routers_of_their_own_stay_apart():
    layers = block(DyNet(3, router="layer", placement="all"))
    alone = [shipped([layer])[0] for layer in layers]
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    assert torch.allclose(through(layers, x), through(alone, x), rtol=1e-10, atol=1e-12)


def test_a_block_has_one_router_of_one_product():
    layers = shipped(block(DyNet(4, placement="all")))
    routers = [m for layer in layers for m in layer.modules() if isinstance(m, BlockRouter)]
    assert [tuple(r.weight.shape) for r in routers] == [(4 * (16 + 24 + 12 + 12 + 8), 12)]


@pytest.mark.parametrize("index", range(len(BLOCK)), ids=map(str, BLOCK))
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("side", [4, 32])  # maps smaller and larger than the kernel
def test_shipped_attention_to_channels_computes_the_same(index, batch, side):
    layer = block(ATTENTION)[index]
    layer.anneal(0.05)  # a temperature in between: 15.5
    (made,) = shipped([layer])
    assert type(made) is ScaledConv
    x = torch.randn(batch, layer.in_channels, side, side, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(layer(x), made(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_block_with_one_router_is_shipped_with_one(batch):
    layers = block(replace(ATTENTION, router="block"))
    for layer in layers:
        layer.anneal(0.05)
    made = shipped(layers)
    routers = [m for layer in made for m in layer.modules() if isinstance(m, BlockRouter)]
    coefficients = (12 + 16) + (16 + 24) + (24 + 12) + 12 + (12 + 8)  # the depthwise layer's filters are its channels
    assert [tuple(r.weight.shape) for r in routers] == [(coefficients, 16)]
    x = torch.randn(batch, 12, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(through(layers, x), through(made, x), rtol=1e-10, atol=1e-12)


def test_scales_of_channels_are_the_sigmoids_times_two_each():
    (made,) = shipped(block(ODConv(spatial=False, placement="all"))[:1])
    x = torch.randn(1, 12, 8, 8, dtype=torch.float64)
    eta = made.router(x)[0]
    static = made.bank.view(16, 12, 3, 3) / 4
    y = nn.functional.conv2d(x * 2 * eta[:12, None, None], static, padding=1) * 2 * eta[12:, None, None]
    assert torch.allclose(made(x), y + made.bias[:, None, None], rtol=1e-10, atol=1e-12)


def test_attention_that_mixes_is_shipped_as_it_is():
    for method in (ODConv(placement="all"), ODConv(kernels=2, spatial=False, placement="all")):
        layer = block(method)[0]
        assert shipped([layer]) == [layer]
    layers = block(ODConv(placement="all", router="block"))  # pointwise ones mix nothing, and read what the others read
    assert shipped(layers) == layers


@pytest.mark.parametrize("method", [DyNet(4, placement="all"), ATTENTION])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_broken_pixel_breaks_what_it_touches_and_no_more(value, method):
    layer = shipped(block(method)[:1])[0].float()
    x = torch.zeros(1, 12, 8, 8)
    x[0, 0, 0, 0] = value
    assert layer(x)[..., 3:, 3:].isfinite().all()


@pytest.mark.parametrize("method", [DyNet(4, placement="all"), ATTENTION])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_stay_in_fp32(dtype, method):
    layer = shipped(block(method)[:1])[0]
    x = torch.randn(1, 12, 8, 8).to(dtype)
    assert layer.to(dtype).router(x).dtype == torch.float32
    assert layer(x).dtype == dtype
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("method", [DyNet(64, placement="all"), ATTENTION])
def test_autocast_predicts_and_mixes_in_full_precision(method):
    layer = shipped(block(method)[:1])[0].float()
    x = torch.randn(1, 12, 8, 8)
    with reuse_kernels(layer):
        layer(x)
        expected = layer._kernel
    with torch.autocast("cpu", torch.bfloat16), reuse_kernels(layer):
        layer(x)
        assert torch.equal(layer._kernel, expected)


def student(method="dynet", **options):
    net, x = networks.make(networks.Residual)
    made = convert(net, make_plan(net, x, "60%", method, options=options)).eval()
    for name, p in made.named_parameters():
        if "router" in name:
            nn.init.normal_(p, std=0.3)
    for layer in made.modules():
        if isinstance(layer, DynamicConv):
            layer.anneal(1.0)
    return made, x


@pytest.mark.parametrize(("method", "options"), [("dynet", {}), ("odconv", {"spatial": False})])
def test_kept_kernels_are_those_of_the_first_image(method, options):
    made, x = student(method, **options)
    folded = fold(made)
    first, second = torch.randn(1, *x.shape[1:]), torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        fresh = folded(second)
        with reuse_kernels(folded):
            alone = folded(first)
            kept = folded(second)
            again = folded(first)
        after = folded(second)
    assert torch.equal(again, alone)
    assert torch.allclose(alone, made(first), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kept, fresh, rtol=1e-3)
    assert torch.equal(after, fresh)


def test_kept_kernels_ask_no_router(monkeypatch):
    folded = fold(student()[0])
    x = torch.randn(1, 3, 16, 16)
    calls = []
    forward = BlockRouter.forward
    monkeypatch.setattr(BlockRouter, "forward", lambda self, x: calls.append(1) or forward(self, x))
    with torch.no_grad(), reuse_kernels(folded):
        folded(x)
        blocks = len(calls)
        folded(x)
    assert len(calls) == blocks > 0


def test_kernels_are_kept_of_one_image_only():
    folded = fold(student()[0])
    with (
        reuse_kernels(folded),
        pytest.raises(DynCompressError, match=r"a batch of 2 .* run the network on a batch of 1"),
    ):
        folded(torch.randn(2, 3, 16, 16))
    with pytest.raises(DynCompressError, match="fold the student first"), reuse_kernels(student()[0]):
        pass


def test_a_folded_network_can_be_copied_and_says_what_it_is():
    folded = fold(student()[0])
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    layer = next(m for m in folded.modules() if isinstance(m, ShippedConv))
    assert str(layer).startswith("MixedConv(\n  dynet, ") and "g=4, as shipped" in str(layer)


def test_a_folded_network_is_not_taken_for_a_student(tmp_path):
    from dyncompress.bundle import save

    with pytest.raises(CheckpointError, match="carries no plan"):
        save(fold(student()[0]), tmp_path / "student.safetensors")
