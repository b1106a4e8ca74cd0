"""ODConv: the authors' numbers, its equation, the form that assembles nothing, where it is placed and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, Macs, ODConv, Static
from dyncompress.layers.execution import run_as
from dyncompress.layers.odconv import ODConvLayer
from tests.layers import published

SPEC = ConvSpec(8, 12, (3, 3), padding=(1, 1))


def layer(spec: ConvSpec = SPEC, random: bool = False, **options: Any) -> ODConvLayer:
    (built,) = ODConv(**options).build([ConvSite("conv", spec, positions=64)])
    assert isinstance(built, ODConvLayer)
    if random:
        for parameter in built.parameters():
            nn.init.normal_(parameter)
    return built


@pytest.mark.parametrize(
    ("name", "kernels", "spec"),
    [
        ("1x", 1, ConvSpec(8, 12, (3, 3), (2, 2), (1, 1), groups=4, bias=False)),
        ("4x", 4, ConvSpec(8, 12, (3, 3), (1, 1), (1, 1), bias=False)),
        ("pointwise", 1, ConvSpec(8, 12, (1, 1), bias=False)),
        ("depthwise", 2, ConvSpec(8, 8, (3, 3), (1, 1), (1, 1), groups=8, bias=False)),
    ],
)
def test_equals_the_authors_layer(name: str, kernels: int, spec: ConvSpec) -> None:
    published.assert_equal("odconv", name, layer(spec, kernels=kernels))


def test_two_taps_by_hand() -> None:
    conv = layer(ConvSpec(1, 1, (2,)), kernels=2, temperature=1.0)
    with torch.no_grad():
        nn.init.zeros_(conv.router.weight)
        # Channel, two taps, two kernels (one channel counts as depthwise, without attention to filters): 2 sigmoid of
        # log 3 is 1.5, of -log 3 is 0.5; softmax gives 1/4, 3/4.
        conv.router.bias.copy_(math.log(3) * torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0]))
        conv.bank.copy_(
            torch.tensor([[4.0, 8.0], [40.0, 80.0]]).reshape(2, 2, 1, 1, 1)
        )  # taps of kernels (4, 40), (8, 80)
        conv.bias.fill_(100.0)  # type: ignore[union-attr]
    # kernel: 1.5 * (1 + 6) = 10.5 and 0.5 * (10 + 60) = 35; y = 100 + 1.5 * (10.5 * 1 + 35 * 2)
    assert conv(torch.tensor([[[1.0, 2.0]]])).item() == pytest.approx(100 + 1.5 * 80.5)


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("kernels", [1, 3])
@pytest.mark.parametrize("spec", [SPEC, ConvSpec(8, 12, (3, 2), (2, 1), groups=4), ConvSpec(8, 12, (1, 1))], ids=str)
def test_equation_sample_by_sample(spec: ConvSpec, kernels: int, spatial: bool) -> None:
    conv = layer(spec, random=True, kernels=kernels, spatial=spatial).double()
    conv.anneal(0.09)
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    size, taps = spec.kernel_size, conv.heads.taps
    stack = conv.bank[0] if not taps else conv.bank.flatten(2).permute(1, 2, 0).reshape(kernels, *spec.weight_shape)
    reduce: Any = conv.squeeze.reduce
    for sample, result in zip(x, conv(x), strict=True):
        hidden = F.relu(reduce.weight @ sample.mean((1, 2)) + reduce.bias)
        c, f, s, k = ((conv.router.weight @ hidden + conv.router.bias) / 3.9).split(tuple(conv.heads))
        mix = torch.softmax(k, 0) if kernels > 1 else torch.ones(1, dtype=torch.float64)
        kernel = torch.einsum("k,koiyx->oiyx", mix, stack) * (2 * torch.sigmoid(s).reshape(size) if taps else 1)
        padding = spec.padding
        assert not isinstance(padding, str)
        scaled = (sample * 2 * torch.sigmoid(c)[:, None, None]).unsqueeze(0)
        expected = F.conv2d(scaled, kernel, None, spec.stride, padding, 1, spec.groups)[0]
        expected = expected * 2 * torch.sigmoid(f)[:, None, None] + conv.bias[:, None, None]  # type: ignore[index]
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


def test_one_kernel_without_spatial_attention_assembles_nothing() -> None:
    conv = layer(kernels=1, spatial=False)
    assert conv.coefficients(torch.randn(2, 8, 5, 5))[2] is None
    assert layer(ConvSpec(8, 12, (1, 1)), kernels=1).coefficients(torch.randn(2, 8, 5, 5))[2] is None


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("kernels", [1, 3])
@pytest.mark.parametrize("spec", [SPEC, ConvSpec(8, 12, (3, 2), (2, 1), groups=4, bias=False)], ids=str)
def test_an_image_alone_has_attention_in_its_kernel(spec: ConvSpec, kernels: int, spatial: bool) -> None:
    conv = layer(spec, random=True, kernels=kernels, spatial=spatial).double()
    x = torch.randn(3, 8, 12, 12, dtype=torch.float64)
    assert spec.kernel_params <= x[:1].numel()  # the form of an image alone, on maps larger than the kernel
    alone = torch.cat([conv(image) for image in x.split(1)])
    torch.testing.assert_close(alone, conv(x), rtol=1e-10, atol=1e-10)
    small = x[..., :4, :4]  # its maps are smaller than the kernel
    torch.testing.assert_close(torch.cat([conv(image) for image in small.split(1)]), conv(small))


@pytest.mark.parametrize("spec", [SPEC, ConvSpec(8, 12, (3, 3), groups=4, bias=False)], ids=str)
@pytest.mark.parametrize("kernels", [1, 4])
def test_taps_run_as_features(spec: ConvSpec, kernels: int) -> None:
    conv, x = layer(spec, random=True, kernels=kernels), torch.randn(3, 8, 6, 6)
    expected = conv(x)
    with run_as("features"):
        assert (conv(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kernels", [1, 4])
def test_absorbs_an_affine_map(kernels: int) -> None:
    conv, x = layer(random=True, kernels=kernels), torch.randn(3, 8, 6, 6)
    scale, shift = torch.randn(12), torch.randn(12)
    expected = conv(x) * scale[:, None, None] + shift[:, None, None]
    conv.absorb(scale, shift)
    assert (conv(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_block_has_one_hidden_layer_that_reads_the_input_of_the_first() -> None:
    sites = [ConvSite("a", SPEC, 64), ConvSite("b", ConvSpec(12, 8, (3, 3), padding=(1, 1)), 64)]
    method = ODConv(spatial=False, router="block", temperature=1.0)
    # hidden 16; a squeezes 8 channels and has 8 + 12 coefficients, b squeezes nothing and has 12 + 8
    assert [cost.router for cost in method.macs(sites)] == [16 * (8 + 20), 16 * 20]
    first, second = layers = method.build(sites)
    assert [sum(p.numel() for p in each.parameters()) for each in layers] == method.params(sites)
    assert method.params(sites) == [864 + 12 + 9 * 16 + 17 * 20, 864 + 8 + 17 * 20]
    for each in layers:
        nn.init.normal_(each.router.weight)
    x = torch.randn(2, 8, 6, 6)
    inner = first(x)
    hidden = first.squeeze(x)
    channels, filters, _ = second.coefficients(inner)
    found = 2 * torch.sigmoid(hidden @ second.router.weight.T + second.router.bias)
    assert torch.equal(torch.cat([channels, filters], 1), found)
    with pytest.raises(DynCompressError, match="no coefficients wait for this layer"):
        second(inner)


def test_placement_takes_kernels_first_then_spatial_attention() -> None:
    small, large = ConvSpec(32, 32, (3, 3)), ConvSpec(512, 512, (3, 3))

    def placed(kernels: int, spec: ConvSpec, positions: int) -> Any:
        return ODConv(kernels).place(ConvSite("conv", spec, positions))[0]

    assert [placed(4, small, positions) for positions in (64, 63, 31)] == [ODConv(4), ODConv(2), ODConv(1)]
    assert placed(1, large, 56) == ODConv(1)  # one kernel from memory takes 56 positions
    assert placed(1, large, 49) == placed(4, large, 49) == ODConv(1, spatial=False)
    assert placed(1, ConvSpec(512, 512, (1, 1)), 49) == ODConv(1)  # nothing to assemble
    assert placed(1, ConvSpec(8, 8, (3, 3), groups=8), 3136) == Static()
    reason = ODConv(4).place(ConvSite("conv", large, 49))[1]
    assert reason.startswith("kernels 4 -> 1: mixing 37.7 MB of kernels, from memory")
    assert reason.endswith("; no spatial attention, which would assemble a kernel")
    everywhere = ODConv(4, placement="all")
    assert everywhere.place(ConvSite("conv", large, 1)) == (everywhere, "")


def test_cost_by_hand() -> None:
    site = ConvSite("conv", ConvSpec(512, 128, (3, 3)), positions=196)
    conv, weights = 589_824 * 196, 589_824  # P = 128 * 512 * 9
    # 512 / 16 = 32 hidden units; 512 + 128 + 9 + 4 coefficients
    assert ODConv(4).macs([site]) == [Macs(conv, 4 * weights, 32 * (512 + 653))]
    assert ODConv(4).params([site]) == [4 * weights + 128 + 513 * 32 + 33 * 653]
    assert ODConv(1).macs([site]) == [Macs(conv, weights, 32 * (512 + 649))]
    assert ODConv(1, spatial=False).macs([site]) == [Macs(conv, 0, 32 * (512 + 640))]
    # depthwise: no attention to filters; at least 16 hidden units
    depthwise = ConvSite("conv", ConvSpec(64, 64, (3, 3), groups=64), positions=196)
    assert ODConv(1).macs([depthwise]) == [Macs(576 * 196, 576, 16 * (64 + 73))]


@pytest.mark.parametrize("options", [{"kernels": 0}, {"spatial": 1}, {"placement": "none"}, {"linear": 1}], ids=str)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DynCompressError, match=f"^{next(iter(options))} "):
        ODConv(**options)


def test_repr_says_what_it_is() -> None:
    assert "odconv, 8 -> 12, 3x3, padding 1, kernels=1, attention to channels, filters, taps" in repr(layer())
