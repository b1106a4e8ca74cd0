"""DyNet starts as a static convolution, exactly, and with kernels that training can tell apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, DyNet, Static
from dyncompress.layers.dynet import DyNetConv

SPEC = ConvSpec(8, 12, (3, 3), padding=(1, 1))
SPECS = [
    SPEC,
    ConvSpec(8, 12, (3, 3), padding=(1, 1), groups=4, bias=False),
    ConvSpec(8, 8, (3, 3), padding=(1, 1), groups=8),
    ConvSpec(8, 16, (1, 1)),
    ConvSpec(8, 6, (5,), padding="same", padding_mode="circular"),
]


def layer(spec: ConvSpec = SPEC, **options: Any) -> DyNetConv:
    (built,) = DyNet(**options).build([ConvSite("conv", spec, positions=64)])
    assert isinstance(built, DyNetConv)
    return built


def weights(spec: ConvSpec) -> tuple[Tensor, Tensor | None]:
    return torch.randn(spec.weight_shape), torch.randn(spec.out_channels) if spec.bias else None


def convolve(x: Tensor, spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Tensor:
    (conv,) = Static().build([ConvSite("conv", spec, positions=64)])
    return torch.func.functional_call(conv, {"weight": weight} | ({} if bias is None else {"bias": bias}), x)


SPARES = {
    "none": lambda spec: None,
    "empty": lambda spec: torch.randn(0, *spec.weight_shape[1:]),
    "few": lambda spec: torch.randn(2, *spec.weight_shape[1:]),
    "many": lambda spec: torch.randn(40, *spec.weight_shape[1:]),
    "huge": lambda spec: 1e4 * torch.randn(40, *spec.weight_shape[1:]),
    "equal": lambda spec: torch.ones(5, *spec.weight_shape[1:]),
    "dead": lambda spec: torch.zeros(5, *spec.weight_shape[1:]),
}


@pytest.mark.parametrize("spare", SPARES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("g", [1, 2, 4, 6])
def test_starts_as_the_static_convolution(spec: ConvSpec, spare: str, g: int) -> None:
    conv, (weight, bias) = layer(spec, g=g), weights(spec)
    nn.init.normal_(conv.router.weight)  # a trained router is reset, too
    conv.load_static(weight, bias, spare=SPARES[spare](spec))
    for x in (torch.randn(3, 8, *(9,) * spec.ndim), torch.zeros(1, 8, *(9,) * spec.ndim)):
        expected = convolve(x, spec, weight, bias)
        assert (conv(x) - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)
    # No two kernels of a channel are equal, or they would stay so; and the anchor is of the static kernel's size.
    kernels = conv.bank.flatten(2)
    apart = torch.cdist(kernels, kernels) + torch.eye(g)
    assert (apart > 0.05 * weight.std()).all()
    assert (kernels[:, 0].norm(dim=1) < 3 * weight.flatten(1).norm(dim=1)).all()


def test_bf16_starts_within_its_rounding() -> None:
    conv, (weight, bias), x = layer().bfloat16(), weights(SPEC), torch.randn(3, 8, 9, 9)
    conv.load_static(weight, bias)
    expected = convolve(x, SPEC, weight, bias)
    assert (conv(x.bfloat16()) - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_dead_convolution_can_learn() -> None:
    conv, x = layer(g=3), torch.randn(2, 8, 5, 5)
    conv.load_static(torch.zeros(SPEC.weight_shape), torch.zeros(12))
    assert conv(x).abs().max() < 1e-6
    conv(x).sum().backward()
    gradients = conv.router.weight.grad
    assert gradients is not None
    assert gradients.unflatten(0, (12, 3)).std(dim=1).min() > 0


def test_atoms_are_the_most_similar_spare_filters() -> None:
    spec = ConvSpec(4, 2, (1, 1), bias=False)
    weight = torch.tensor([[2.0, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 3.0]])
    # Of any length; the first channel is nearest to 0 then 1, the second to 3 then 2; opposites are far.
    spare = torch.tensor([[9.0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 9], [-2, -0.2, -0.1, 0]])
    conv = layer(spec, g=3)
    conv.load_static(weight.reshape(2, 4, 1, 1), None, spare=spare.reshape(5, 4, 1, 1))
    expected = torch.stack([spare[[0, 1]], spare[[3, 2]]])
    expected = F.normalize(expected, dim=2) * weight.norm(dim=1)[:, None, None]
    noise = (conv.bank[:, 1:].flatten(2) - expected) / weight.square().mean().sqrt()
    assert noise.abs().max() < 0.2 * 4  # 0.2 times the rms of the weight, normally distributed
    assert noise.std() > 0.2 / 4


def test_a_dead_spare_filter_is_no_atom() -> None:
    conv, weight = layer(ConvSpec(4, 1, (1, 1)), g=2), torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    conv.load_static(weight, None, spare=torch.cat([torch.zeros_like(weight), -5 * weight]))
    atom = conv.bank[0, 1]
    assert F.cosine_similarity(atom.flatten(), -weight.flatten(), dim=0) > 0.9


def test_the_same_seed_gives_the_same_bank() -> None:
    weight, bias = weights(SPEC)
    banks = []
    for seed in (1, 1, 2):
        conv = layer()
        conv.load_static(weight, bias, spare=torch.ones(3, 8, 3, 3), generator=torch.Generator().manual_seed(seed))
        banks.append(conv.bank.detach())
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


def test_the_first_step_tells_the_kernels_apart() -> None:
    conv, (weight, bias), x = layer(), weights(SPEC), torch.randn(4, 8, 9, 9)
    conv.load_static(weight, bias, spare=torch.randn(5, 8, 3, 3))
    (conv(x) * torch.randn(4, 12, 9, 9)).sum().backward()
    for gradient in (conv.router.weight.grad, conv.router.bias.grad):
        assert gradient is not None
        assert gradient.reshape(12, 4, -1).std(dim=1).min() > 0


def test_each_layer_of_a_block_starts_alone() -> None:
    sites = [ConvSite("a", ConvSpec(4, 6, (3, 3), padding=(1, 1)), 64), ConvSite("b", ConvSpec(6, 4, (1, 1)), 64)]
    net = nn.Sequential(*DyNet(g=3, reduction=2).build(sites))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 4, 8, 8)
    hidden = net[0](x)
    net[1](hidden)
    weight, bias = weights(sites[1].spec)
    net[1].load_static(weight, bias)
    torch.testing.assert_close(net[0](x), hidden)  # the owner of the router is as it was
    torch.testing.assert_close(net[1](hidden), convolve(hidden, sites[1].spec, weight, bias), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(12, 4, 3, 3)}, r"weight has shape \(12, 4, 3, 3\).*\(12, 8, 3, 3\)"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\).*\(12,\)"),
        ({"spare": torch.zeros(2, 16, 3, 3)}, r"spare filters have shape \(2, 16, 3, 3\).*\(n, 8, 3, 3\)"),
    ],
    ids=["weight", "bias", "spare"],
)
def test_a_warm_start_that_does_not_fit_is_refused(arguments: dict[str, Tensor], message: str) -> None:
    conv = layer()
    before = conv.bank.clone()
    with pytest.raises(DynCompressError, match=message):
        conv.load_static(**({"weight": torch.zeros(12, 8, 3, 3), "bias": torch.zeros(12)} | arguments))
    assert torch.equal(conv.bank, before)
