from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import networks
from dyncompress.conversion import TAG, convert, convert_, narrowed, plan_of, plans_in, recalibrate
from dyncompress.errors import CheckpointError, DynCompressError, PlanError
from dyncompress.layers import DynamicConv
from dyncompress.planning import make_plan


def flat(net, x):
    with torch.no_grad():
        return torch.cat([t.flatten() for t in tree_leaves(net(x))])


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_step_zero_equals_the_narrowed_static_network(network):
    net, x = networks.make(network)
    before = copy.deepcopy(net.state_dict())
    plan = make_plan(net, x, "55%", "dynet", options={"placement": "all"})
    student, reference = convert(net, plan), narrowed(net, plan)
    assert (flat(student, x) - flat(reference, x)).abs().max() < 1e-4
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert type(student) is type(net)


def test_every_parameter_of_the_student_learns():
    net, x = networks.make(networks.Residual)
    student = convert(net, make_plan(net, x, "50%")).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for _ in range(2):  # the router's input weights have a gradient as soon as its last layer left zero
        optimizer.zero_grad()
        student(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize(("method", "part"), [("dynet", "bank"), ("auto", "squeeze.reduce.weight")])
def test_same_seed_same_student_other_seed_other_weights(method, part):
    net, x = networks.make(networks.Residual)
    plan = make_plan(net, x, "50%", method)
    found = []
    for state, seed in enumerate((0, 0, 1)):
        torch.manual_seed(state)  # what others draw is no matter
        expected = torch.rand(1, generator=torch.Generator().manual_seed(state))
        found.append(convert(net, plan, seed=seed).state_dict())
        assert torch.equal(torch.rand(1), expected)  # nor is theirs changed
    a, b, c = found
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a if k.endswith(part))


def test_in_place_keeps_the_identity_of_what_is_not_replaced():
    net, x = networks.make(networks.Residual)
    linear, norm = net.head.linear.weight, net.stem[1].weight
    assert convert_(net, make_plan(net, x, "50%")) is net
    assert net.head.linear.weight is linear and net.stem[1].weight is norm
    assert norm.shape[0] < 16


def test_modes_dtypes_and_frozen_parameters_are_kept():
    net, x = networks.make(networks.PReLUFrozen)
    net.double().train()
    net.conv.eval()
    net.conv[0].weight.requires_grad_(False)
    student = convert(net, make_plan(net, x.double(), "50%"))
    assert student.training and not student.conv[0].training
    assert isinstance(student.conv[0], DynamicConv) and student.conv[0].bank.dtype == torch.float64
    assert not any(p.requires_grad for p in student.conv[0].parameters())
    assert not student.stem[0].weight.requires_grad


def test_the_plan_travels_in_the_state_dict():
    net, x = networks.make(networks.Residual)
    student = convert(net, make_plan(net, x, "50%"))
    state = student.state_dict()
    tag = state[f"stem.0.{TAG}._extra_state"]
    assert tag.dtype == torch.uint8
    found = plans_in({f"net.{k}": v for k, v in state.items()})
    assert list(found) == ["net."] and found["net."] == plan_of(student)
    # another original picks other channels by magnitude; the plan in the state dict names those of this one
    other, _ = networks.make(networks.Residual, seed=1)
    rebuilt = convert(other, found["net."])
    rebuilt.load_state_dict(state)
    assert torch.equal(flat(rebuilt, x), flat(student, x))


def test_weights_of_another_plan_are_refused():
    net, x = networks.make(networks.Residual)
    student = convert(net, make_plan(net, x, "50%", "dynet"))
    other = convert(net, make_plan(net, x, "50%", "dynet", options={"router": "layer"}))
    with pytest.raises((CheckpointError, RuntimeError)):
        other.load_state_dict(student.state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_compute_the_same_and_carry_the_plan(how):
    net, x = networks.make(networks.ZeroPad)
    student = convert(net, make_plan(net, x, "50%"))
    again = how(student)
    assert torch.equal(flat(again, x), flat(student, x))
    assert plan_of(again) == plan_of(student)


def test_a_plan_of_another_network_is_refused_with_the_first_difference():
    plan = make_plan(*networks.make(networks.Residual), "50%")
    net, x = networks.make(networks.ZeroPad)
    before = flat(net, x)
    with pytest.raises(PlanError, match=r"another network: the network has no parameter 'blocks.0.conv1.weight'"):
        convert_(net, plan)
    assert torch.equal(flat(net, x), before)
    wide, _ = networks.make(networks.Residual)
    wide.head.linear = nn.Linear(32, 7)
    with pytest.raises(PlanError, match=r"'head.linear.weight' has shape \(7, 32\), the plan expects \(5, 32\)"):
        convert(wide, plan)


def test_a_converted_network_is_not_converted_again():
    net, x = networks.make(networks.Residual)
    plan = make_plan(net, x, "50%")
    with pytest.raises(PlanError, match="converted already"):
        convert(convert(net, plan), plan)


def test_a_damaged_plan_in_a_state_dict_is_named():
    net, x = networks.make(networks.Residual)
    state = convert(net, make_plan(net, x, "50%")).state_dict()
    key = f"stem.0.{TAG}._extra_state"
    state[key] = state[key].clone()
    state[key][5] ^= 255
    with pytest.raises(CheckpointError, match=key):
        plans_in(state)
    assert plans_in({"weight": torch.zeros(1)}) == {}


def test_recalibrated_statistics_are_those_of_the_data():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    nn.init.constant_(net[0].weight, 2.0)
    batches = [torch.full((1, 1, 2, 2), v) for v in (1.0, 3.0)]
    modes = [m.training for m in net.eval().modules()]
    assert recalibrate(net, batches) == 2
    assert net[1].running_mean.item() == 4.0  # mean of 2 and 6
    assert net[1].momentum == 0.1 and [m.training for m in net.modules()] == modes
    assert recalibrate(net, []) == 0 and net[1].running_mean.item() == 4.0


def test_errors_are_ours():
    assert issubclass(PlanError, DynCompressError) and issubclass(CheckpointError, DynCompressError)
