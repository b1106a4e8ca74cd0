"""Narrowing in steps: what is put back computes the same, what is gone stays gone, the last step is the plan."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import networks
from dyncompress import gradual
from dyncompress.conversion import convert, narrowed, plan_of
from dyncompress.errors import PlanError
from dyncompress.graph import tensors_in
from dyncompress.planning import make_plan

CUT = [networks.Residual, networks.ZeroPad, networks.Dense, networks.Inverted, networks.Grouped, networks.UNet,
       networks.PixelShuffle, networks.OneD, networks.ThreeD]  # fmt: skip


def outputs(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensors_in(net.eval()(x))[0]


def trained(net: nn.Module) -> nn.Module:
    """Other weights and statistics, as after a training."""
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point() and tensor.numel():
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01)
    return net


@pytest.mark.parametrize("network", CUT, ids=lambda network: network.__name__)
def test_put_back_it_computes_what_the_narrowed_network_does(network: type[nn.Module]) -> None:
    net, x = networks.make(network)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plan = make_plan(net, x, "50%", "static")
    narrow = trained(convert(net, plan))
    carried = plan_of(narrow)
    assert carried is not None
    wide = gradual.put_back(narrow, net, carried, x)
    assert {k: v.shape for k, v in wide.state_dict().items()} == {k: v.shape for k, v in before.items()}
    torch.testing.assert_close(outputs(wide, x), outputs(narrow, x), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    again = narrowed(wide, carried)  # cut once more by the same plan, it is the trained network, bit by bit
    found = dict(narrow.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in again.named_parameters())


@pytest.mark.parametrize("method", ["static", "dynet"])
def test_widths_shrink_evenly_and_no_channel_comes_back(method: str) -> None:
    net, x = networks.make(networks.Residual)
    plan = make_plan(net, x, "30%", method)
    full = [group.channels for group in plan.graph.groups]
    left, wide, seen = gradual.everything(plan), net, []
    for step in (1, 2, 3):
        way = gradual.next_plan(wide, plan, left, step / 3)
        now = gradual.channels_of(way)
        assert all(set(inner) <= set(outer) for inner, outer in zip(now, left, strict=True))
        expected = [max(k, round(c * (k / c) ** (step / 3))) for c, k in zip(full, plan.widths, strict=True)]
        assert way.widths == expected
        seen.append(way.method)
        left = now
        if step < 3:
            wide = gradual.put_back(trained(convert(wide, way)), net, way, x)
    assert seen == ["static", "static", method] and way.widths == plan.widths and way.target == plan.target
    student = convert(wide, way)
    torch.testing.assert_close(outputs(student, x), outputs(narrowed(wide, way), x), rtol=1e-3, atol=1e-4)
    assert student.state_dict().keys() == convert(net, plan).state_dict().keys()


def test_which_channels_go_is_asked_of_the_weights_as_they_are_and_named_ones_stay() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), torch.zeros(1, 3, 4, 4)
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(8.0, 0, -1).view(8, 1, 1, 1).expand(8, 3, 1, 1))  # the first weigh most
    plan = make_plan(net, x, "30%", "static", min_width=2)
    plan = dataclasses.replace(plan, keep=(2,))
    left = gradual.everything(plan)
    first = gradual.next_plan(net, plan, left, 0.5)
    assert first.widths == [4] and first.keep == ((0, 1, 2, 3),)  # 8 * sqrt(2 / 8)
    with torch.no_grad():
        net[0].weight[2:4] *= 100
        net[0].weight[7] *= 1000  # gone already
    assert gradual.next_plan(net, plan, gradual.channels_of(first), 1).keep == ((2, 3),)
    named = dataclasses.replace(plan, keep=((6, 7),))
    assert set(gradual.next_plan(net, named, left, 0.5).keep[0]) > {6, 7}
    assert gradual.next_plan(net, named, left, 1) == named


def test_where_a_layer_depends_on_the_number_of_channels_it_says_so() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(1, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    x = torch.randn(2, 3, 8, 8)
    plan = make_plan(net, x, "50%", "static")
    narrow = convert(net, plan)
    carried = plan_of(narrow)
    assert carried is not None
    with pytest.raises(PlanError, match=r"can't be narrowed in steps.*narrowing_steps: 1"):
        gradual.put_back(narrow, net, carried, x)


def test_a_plan_of_numbers_names_no_channels() -> None:
    net, x = networks.make(networks.Residual)
    with pytest.raises(PlanError, match="take the one that the converted network carries"):
        gradual.channels_of(make_plan(net, x, "50%", "static"))


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"), [(12, 1, [12]), (12, 3, [4, 4, 4]), (5, 2, [2, 3]), (3, 3, [1, 1, 1])]
)
def test_epochs_are_shared_out(epochs: int, steps: int, expected: list[int]) -> None:
    assert gradual.lengths(epochs, steps) == expected
