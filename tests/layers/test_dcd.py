"""DCD: the authors' numbers, its matrix by hand, where it is placed and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, Dcd, Macs, Static
from dyncompress.layers.dcd import DcdConv
from tests.layers import published

SPEC = ConvSpec(8, 12, (3, 3), padding=(1, 1))


def layer(spec: ConvSpec = SPEC, random: bool = False, **options: Any) -> DcdConv:
    (built,) = Dcd(**options).build([ConvSite("conv", spec, positions=64)])
    assert isinstance(built, DcdConv)
    if random:
        for parameter in built.parameters():
            nn.init.normal_(parameter, std=0.5)
    return built


@pytest.mark.parametrize(("name", "kernel", "stride"), [("3x3", 3, 2), ("1x1", 1, 1)])
def test_equals_the_authors_layer(name: str, kernel: int, stride: int) -> None:
    published.assert_equal("dcd", name, layer(ConvSpec(64, 12, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2)))


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ConvSpec(8, 12, (1, 1), (2, 2)),
        ConvSpec(8, 12, (4, 3), (2, 1), (2, 0), (1, 2), bias=False),
        ConvSpec(8, 12, (1, 1), padding=(1, 2)),
        ConvSpec(8, 12, (1, 3), padding=(2, 2), padding_mode="reflect"),
        ConvSpec(8, 12, (2, 3), padding=(1, 1)),
    ],
    ids=str,
)
def test_is_one_kernel_with_a_low_rank_middle_tap(spec: ConvSpec) -> None:
    """W = Lambda W_0 + P (Phi + 1) Q^T in the middle tap, sample by sample."""
    conv = layer(spec, random=True, latent=3).double()
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64)
    phi, scale = conv.coefficients(x)
    assert phi is not None and conv.p is not None and conv.q is not None
    (static,) = Static().build([ConvSite("conv", spec, positions=64)])
    for index, result in enumerate(conv(x)):
        weight = conv.weight * scale[index].reshape(-1, 1, 1, 1)
        low_rank = conv.p.flatten(1) @ (phi[index] + torch.eye(3, dtype=torch.float64)) @ conv.q.flatten(1)
        middle = tuple((k - 1) // 2 for k in spec.kernel_size)
        taps = F.pad(low_rank[..., None, None], (middle[1], spec.kernel_size[1] - middle[1] - 1,
                                                middle[0], spec.kernel_size[0] - middle[0] - 1))  # fmt: skip
        given: dict[str, Tensor] = {"weight": weight + taps}
        if conv.bias is not None:
            given["bias"] = conv.bias
        expected = torch.func.functional_call(static.double(), given, x[index : index + 1])[0]
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_grouped_convolutions_have_the_scale_alone() -> None:
    conv, x = layer(ConvSpec(8, 12, (3, 3), groups=4), random=True), torch.randn(2, 8, 5, 5)
    phi, scale = conv.coefficients(x)
    assert phi is None and conv.p is None and conv.q is None
    expected = torch.conv2d(x, conv.weight, groups=4) * scale[:, :, None, None] + conv.bias[:, None, None]  # type: ignore
    torch.testing.assert_close(conv(x), expected)


def test_a_warm_start_learns_all_of_it_within_two_steps() -> None:
    """P starts at 0, so that Q and Phi have no gradient before P has moved."""
    conv, x = layer(), torch.randn(4, 8, 5, 5)
    conv.load_static(torch.randn(12, 8, 3, 3), torch.zeros(12))
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        conv(x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in conv.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_absorbs_an_affine_map() -> None:
    conv, x = layer(random=True), torch.randn(3, 8, 6, 6)
    scale, shift = torch.randn(12), torch.randn(12)
    expected = conv(x) * scale[:, None, None] + shift[:, None, None]
    conv.absorb(scale, shift)
    assert (conv(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_placement() -> None:
    def placed(method: Dcd, spec: ConvSpec, positions: int = 3136) -> tuple[Any, str]:
        return method.place(ConvSite("conv", spec, positions))

    assert placed(Dcd(), SPEC) == (Dcd(), "")
    assert placed(Dcd(), SPEC, 1)[1].startswith("static: tiny, 864 multiply-adds")
    assert placed(Dcd(), ConvSpec(8, 8, (3, 3), groups=8))[0] == Static()
    assert placed(Dcd(), ConvSpec(8, 8, (3, 3), groups=2))[1].startswith("static: 2 groups; dynamic channel fusion")
    everywhere = Dcd(placement="all")
    assert placed(everywhere, ConvSpec(8, 8, (3, 3), groups=2)) == (everywhere, "")


def test_cost_by_hand() -> None:
    site = ConvSite("conv", ConvSpec(256, 128, (3, 3)), positions=784)
    # P = 128 * 256 * 9 = 294,912; L = sqrt(256) = 16; max(256, 16^2) / 16 = 16 hidden units
    router = 16 * (256 + 16 + 256 + 128)
    assert Dcd().macs([site]) == [Macs(294_912 * 784, 16 * (256 + 16 + 128) * 784, router)]
    assert Dcd().params([site]) == [294_912 + 128 + 16 * (256 + 128) + router]
    grouped = ConvSite("conv", ConvSpec(256, 128, (3, 3), groups=2), positions=784)
    assert Dcd().macs([grouped]) == [Macs(147_456 * 784, 0, 16 * (256 + 16 + 128))]


@pytest.mark.parametrize("options", [{"latent": 0}, {"latent": 2.0}, {"placement": "none"}, {"linear": None}], ids=str)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DynCompressError, match=f"^{next(iter(options))} "):
        Dcd(**options)


def test_repr_says_what_it_is() -> None:
    assert "dcd, 8 -> 12, 3x3, padding 1, latent=4" in repr(layer())
