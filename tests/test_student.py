"""A network converted where it stands, and able to go back."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from dyncompress.conversion import convert, plan_of
from dyncompress.errors import DynCompressError, PlanError
from dyncompress.planning import make_plan
from dyncompress.student import Student
from tests.classifiers import Net, equal, weights

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Scaled(nn.Module):
    """Has a parameter and a count of its own, which the cut changes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_channels = 32
        self.first = nn.Conv2d(3, 32, 3)
        self.scale = nn.Parameter(torch.ones(32))
        self.last = nn.Conv2d(32, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert self.num_channels == len(self.scale)
        return self.last(self.first(x) * self.scale.view(1, -1, 1, 1))


@pytest.mark.parametrize("kind", [Net, Scaled])
def test_there_and_back(kind: type[nn.Module]) -> None:
    net = kind()
    before, answer = weights(net), net.eval()(EXAMPLE + 1)
    student = Student("net", net)
    plan = make_plan(net, EXAMPLE, "50%")
    expected = convert(net, plan, seed=3)
    student.convert(plan, seed=3)
    assert student.network is net
    assert equal(net, weights(expected))
    student.revert()
    assert equal(net, before)
    assert torch.equal(net(EXAMPLE + 1), answer)
    assert student.plan is None
    student.revert()  # twice does no harm


@pytest.mark.parametrize("kind", [Net, Scaled])
def test_another_plan_starts_from_the_original(kind: type[nn.Module]) -> None:
    net = kind()
    original = deepcopy(net)
    student = Student("", net)
    student.convert(make_plan(net, EXAMPLE, "50%"), seed=0)
    other = make_plan(original, EXAMPLE, "35%", "static")
    student.convert(other, seed=0)
    assert equal(net, weights(convert(original, other)))
    assert net.eval()(EXAMPLE).shape == original.eval()(EXAMPLE).shape
    student.settle()
    assert student.original is None


def test_what_is_not_replaced_keeps_its_identity() -> None:
    net = Net()
    norm, linear = net.bn1, net.linear.weight
    Student("", net).convert(make_plan(net, EXAMPLE, "50%"), seed=0)
    assert net.bn1 is norm
    assert net.linear.weight is linear


def test_a_compiled_network_is_converted_inside_its_wrapper() -> None:
    net = Net()
    student = Student("net", torch.compile(net, backend="eager"))
    student.convert(make_plan(net, EXAMPLE, "50%"), seed=0)
    assert student.inner is net
    assert plan_of(net) == student.plan is not None


def test_an_error_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    before = weights(net)
    student = Student("net", net)
    with pytest.raises(PlanError, match="another network"):
        student.convert(make_plan(Net(24), EXAMPLE, "50%"), seed=0)
    assert student.original is None
    plan = make_plan(net, EXAMPLE, "50%")
    monkeypatch.setattr("dyncompress.conversion.load_static", broken)  # in the middle of the conversion
    with pytest.raises(DynCompressError, match="in the middle"):
        student.convert(plan, seed=0)
    assert equal(net, before)
    assert student.plan is None


def broken(*_: object, **__: object) -> None:
    raise DynCompressError("in the middle")
