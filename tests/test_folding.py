"""A folded network computes what the student does; what of it was folded, and what stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import networks
from dyncompress.conversion import convert
from dyncompress.errors import PlanError
from dyncompress.folding import fold
from dyncompress.layers import DynamicConv, list_methods
from dyncompress.planning import make_plan
from dyncompress.schedules import anneal


@pytest.mark.parametrize("network", networks.BATCH_NORMED)
@pytest.mark.parametrize("method", ["static", "dynet", "condconv", "dyconv", "odconv", "dcd"])
def test_a_folded_network_computes_the_same(network, method):
    net, x = networks.make(network)
    student = convert(net, make_plan(net, x, "60%", method))
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "router" in name or name.endswith(".p"):
                p.add_(0.1 * torch.randn_like(p))
        folded = fold(student)
        expected, found = ([t.flatten() for t in tree_leaves(n(x))] for n in (student, folded))
    expected, found = torch.cat(expected), torch.cat(found)
    assert (expected - found).abs().max() < 1e-5 * expected.abs().max()


def count(net):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


ALL = {"placement": "all"}
FORMS = [
    ("static", {}),
    ("auto", {}),
    ("c2sp", {}),
    ("c2sp", {"g": 4}),
    ("condconv", ALL),
    ("dyconv", ALL),
    ("dynet", ALL),
    ("dynet", {"router": "layer", "reduction": 2, **ALL}),
    ("dcd", ALL),
    ("dcd", {"pool": 2, **ALL}),
    ("odconv", ALL),
    ("odconv", {"spatial": False, **ALL}),
    ("odconv", {"kernels": 4, **ALL}),
    ("odconv", {"kernels": 4, "spatial": False, **ALL}),
    ("kernelwarehouse", ALL),
    ("kernelwarehouse", {"ratio": 0.5, **ALL}),
    ("kernelwarehouse", {"ratio": 2, "basis": 0.5, **ALL}),
    ("drconv", ALL),
    ("dyco3d", ALL),  # pointwise layers: the shortcut of one network, two layers of the other and its gate
    ("dyco3d", {"hidden": 0, **ALL}),
]


def test_every_registered_method_has_a_form():
    assert {method for method, _ in FORMS} == set(list_methods())


@pytest.mark.parametrize(("network", "norms"), [(networks.Residual, 8), (networks.Inverted, 4)])
@pytest.mark.parametrize(("method", "options"), FORMS, ids=str)
def test_every_form_folds_every_norm_and_computes_the_same(network, norms, method, options):
    """In fp64 to 1e-12 of the largest output, in the middle of its schedule, with no parameter where it started."""
    net, x = networks.make(network)  # whose norms have statistics, scales and shifts
    student = convert(net, make_plan(net, x, "45%", method, options=options)).double().eval()
    layers = [m for m in student.modules() if isinstance(m, DynamicConv)]
    assert bool(layers) == (method != "static")
    anneal(student, 0.05)
    with torch.no_grad():
        for p in (p for layer in layers for p in layer.parameters()):
            p.add_(0.3 * torch.randn_like(p))
        batches = (x.double(), x[:1].double())  # shipped layers go ways of their own for one image
        answers = [student(images) for images in batches]
        folded = fold(student)
        assert (count(student), count(folded)) == (norms, 0)
        for images, expected in zip(batches, answers, strict=True):
            assert (folded(images) - expected).abs().max() < 1e-12 * expected.abs().max()
            assert torch.equal(student(images), expected)  # a copy was folded


@pytest.mark.parametrize("method", ["static", "kernelwarehouse", "odconv", "dcd"])
def test_a_norm_behind_a_linear_layer_is_kept(method):
    """It could be folded by its maths; the channel graph tells of norms behind convolutions only."""

    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.hidden, self.bn, self.out = (
                nn.Conv2d(3, 16, 3), nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 2)
            )  # fmt: skip

        def forward(self, x):
            return self.out(self.bn(self.hidden(self.conv(x).mean((2, 3)))).relu())

    torch.manual_seed(0)
    net, x = Perceptron().eval(), torch.randn(2, 3, 8, 8)
    net.bn.running_mean.normal_()
    options = {} if method == "static" else ALL if method == "kernelwarehouse" else {"linear": True, **ALL}
    student = convert(net, make_plan(net, x, "90%", method, options=options))
    assert count(fold(student)) == 1
    assert torch.allclose(fold(student)(x), student(x), rtol=1e-4, atol=1e-5)


def test_batch_norms_are_gone_and_the_student_is_left_alone():
    net, x = networks.make(networks.Residual)
    student = convert(net, make_plan(net, x, "50%")).train()
    assert (count(student), count(fold(student)), count(student)) == (8, 0, 8)
    assert student.training


def test_a_norm_that_shares_its_input_is_kept():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(32, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            return self.out(torch.cat([y, self.bn(y)], 1))

    torch.manual_seed(0)
    net, x = Tapped().eval(), torch.randn(1, 3, 8, 8)
    net.bn.running_mean.normal_()
    student = convert(net, make_plan(net, x, "50%", "static"))
    assert count(fold(student)) == 1
    assert torch.allclose(fold(student)(x), student(x), atol=1e-6)


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the activation is part of the norm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class NormAndMore(nn.BatchNorm2d):
    """What it does next stands in its code alone."""

    def forward(self, x):
        return super().forward(x) + x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(("kind", "left"), [(NormAndActivation, 0), (NormAndMore, 1)])
def test_what_a_norm_does_besides_normalising_is_not_lost(kind, left):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), kind(16), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randn(2, 3, 8, 8)
    net(x)
    net[1].running_mean.normal_()
    student = convert(net, make_plan(net, x, "70%"))
    folded = fold(student)
    assert count(folded) == left
    assert torch.allclose(folded(x), student(x), rtol=1e-4, atol=1e-5)


def test_only_converted_networks_are_folded():
    with pytest.raises(PlanError, match="carries no plan"):
        fold(networks.Residual())
