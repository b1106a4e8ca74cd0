"""The checks of the zoo find what they look for: each is shown a network that is broken in its way."""

from __future__ import annotations

import dataclasses
from copy import deepcopy

import pytest
import torch
from torch import nn

import networks
from benchmarks.checks import distance, learns, round_trip, same_form
from benchmarks.networks import call, enliven
from benchmarks.zeroing import equivalence, exempt
from dyncompress.conversion import convert, plan_of
from dyncompress.planning import make_plan


def student_of(network, target="50%"):
    net, example = networks.make(network)
    student = convert(net, make_plan(net, example, target))
    return net, example, student, plan_of(student)


def test_the_form_of_an_output():
    x = torch.randn(2, 8)
    assert same_form(nn.Linear(8, 3), nn.Linear(8, 3), x) == ""
    assert (
        same_form(nn.Linear(8, 4), nn.Linear(8, 3), x) == "an output is (2, 4) torch.float32, not (2, 3) torch.float32"
    )
    assert "structure" in same_form(nn.LSTM(8, 3), nn.Linear(8, 3), x)


def test_a_parameter_without_a_gradient_is_named():
    net, example, student, _ = student_of(networks.Residual)
    assert learns(student, net, example) == ""
    lost = deepcopy(student)
    lost.head.forward = lambda x: nn.functional.linear(x.mean((2, 3)), lost.head.linear.weight.detach())
    assert "no gradient for" in learns(lost, net, example)


def test_what_never_trained_needs_no_gradient():
    net = nn.Linear(8, 3).requires_grad_(False)
    assert learns(net, net, torch.randn(2, 8)).startswith("n/a")


def test_a_state_dict_that_lacks_something_is_found():
    net, example, student, plan = student_of(networks.Residual)
    assert round_trip(student, plan, net, example) == ""
    student.blocks[0].bn1.register_buffer("running_mean", student.blocks[0].bn1.running_mean, persistent=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        round_trip(student, plan, net, example)


def test_distance_is_relative_and_not_a_number_is_far():
    a = {"x": torch.tensor([1.0, 200.0]), "n": torch.tensor([1])}
    assert distance(a, {"x": torch.tensor([1.0, 100.0]), "n": torch.tensor([2])}) == 1
    assert distance({"x": torch.tensor([float("nan")])}, {"x": torch.tensor([1.0])}) == float("inf")


@pytest.mark.parametrize("network", [networks.Residual, networks.Shuffle, networks.UNet])
def test_zeroing_finds_a_wrong_index_map(network):
    net, example, _, plan = student_of(network)
    assert exempt(net, plan, example) == ""
    right = equivalence(net, plan, example, {})
    assert right["wrong"] == "" and right["distance"] < 1e-9 < right["control"]
    name, axis = next((k, r) for k, r in plan.graph.axes.items() if k.endswith("weight:1"))
    group, start, count, repeat = axis[0]
    turned = ((group, start + 1, count - 1, repeat), (group, start, 1, repeat), *axis[1:])
    wrong = dataclasses.replace(plan, graph=dataclasses.replace(plan.graph, axes={**plan.graph.axes, name: turned}))
    assert "from the zeroed one" in _cut_by(net, wrong, plan, example)


def _cut_by(net, wrong, plan, example):
    """Cut by the wrong map, zeroed by the right one."""
    import benchmarks.zeroing as zeroing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeroing, "narrowed", lambda wide, _, cut=zeroing.narrowed: cut(wide, wrong))
        return equivalence(net, plan, example, {})["wrong"]


@pytest.mark.parametrize("network", [networks.GroupNormed, networks.ConvNeXt])
def test_norms_over_channels_are_exempt_from_zeroing(network):
    net, example, _, plan = student_of(network)
    assert "norm" in exempt(net, plan, example)


def test_constant_parameters_come_alive_and_statistics_are_measured():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    example = torch.randn(4, 3, 8, 8) * 5
    enliven(net, example)
    assert net[1].weight.std() > 0 and net[1].bias.std() > 0
    with torch.no_grad():
        normal = (call(net.eval(), example) - net[1].bias[:, None, None]) / net[1].weight[:, None, None]
    assert normal.std() == pytest.approx(1, abs=0.05)
    assert net[1].momentum == 0.1
