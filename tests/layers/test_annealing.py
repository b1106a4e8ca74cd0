"""A temperature falls with the progress of training and survives a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, DyConv, DyNet, Method, ODConv
from dyncompress.layers.annealing import Temperature

SITE = ConvSite("conv", ConvSpec(8, 12, (3, 3), padding=(1, 1)), positions=64)
METHODS = [DyConv(), ODConv(kernels=4), ODConv(kernels=1)]


@pytest.mark.parametrize(("progress", "expected"), [(0, 30), (0.05, 15.5), (0.1, 1), (0.5, 1), (1, 1)])
def test_falls_linearly_to_one_and_stays(progress: float, expected: float) -> None:
    temperature = Temperature(start=30, warmup=0.1)
    assert temperature.value == 30
    temperature.anneal(progress)
    assert temperature.value.item() == pytest.approx(expected)
    assert temperature(torch.tensor(60.0)).item() == pytest.approx(60 / expected)


def test_a_second_training_does_not_raise_it() -> None:
    temperature = Temperature(start=30, warmup=0.1)
    for progress, expected in ((0.05, 15.5), (0.0, 15.5), (0.2, 1.0), (0.0, 1.0)):
        temperature.anneal(progress)
        assert temperature.value == expected


def test_without_warmup_it_is_one_from_the_start() -> None:
    temperature = Temperature(start=30, warmup=0)
    temperature.anneal(0)
    assert temperature.value == 1


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_checkpoint_is_the_same_function_again(method: Method) -> None:
    layer: Any = method.build([SITE])[0]
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(2, 8, 5, 5)
    even = layer(x)
    layer.anneal(0.03)
    other = method.build([SITE])[0]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert not torch.allclose(layer(x), even)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_warm_start_holds_at_every_temperature(method: Method) -> None:
    layer: Any = method.build([SITE])[0]
    weight, bias, x = torch.randn(12, 8, 3, 3), torch.randn(12), torch.randn(2, 8, 5, 5)
    layer.load_static(weight, bias)
    expected = torch.conv2d(x, weight, bias, padding=1)
    for progress in (0.0, 0.07, 1.0):
        layer.anneal(progress)
        assert (layer(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_other_layers_have_nothing_to_anneal() -> None:
    layer: Any = DyNet().build([SITE])[0]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.anneal(0.5)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5}, {"temperature": float("inf")}, {"temperature": "30"}, {"warmup": -0.1}, {"warmup": True}],
    ids=str,
)
@pytest.mark.parametrize("method", [DyConv, ODConv])
def test_options_that_make_no_sense_are_refused(method: Any, options: dict[str, Any]) -> None:
    with pytest.raises(DynCompressError, match=f"^{next(iter(options))} "):
        method(**options)
