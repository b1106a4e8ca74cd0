"""Costs against hand counts, torch's counter and ptflops."""

from __future__ import annotations

import pytest
import torch
from ptflops import get_model_complexity_info
from torch import nn

import networks
from dyncompress.conversion import convert
from dyncompress.cost import CostModel, count_params, fits, measure_macs, static_choices, widths
from dyncompress.layers import DyNet, Static
from dyncompress.planning import make_plan
from dyncompress.tracing import trace


def test_a_static_network_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, stride=2))
    # 3*8*9 weights at 16*16 positions + 8*4 weights at 8*8 positions = 55296 + 2048
    assert measure_macs(net, torch.zeros(2, 3, 16, 16)) == 57344
    assert count_params(net) == 3 * 8 * 9 + 8 + 8 * 4 + 4


def test_a_dynamic_network_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    plan = make_plan(net, torch.zeros(1, 3, 16, 16), "100%", DyNet(placement="all"), ignore=("0",))
    assert plan.macs_before == 256 * (3 * 8 * 9 + 8 * 8 * 9 + 8 * 4)
    first, middle, last = plan.layers
    k = middle.out_after
    assert 1 <= k < 8
    assert first.macs_after == first.macs_before == 256 * 3 * 8 * 9
    # conv at 256 positions, assembly of 4 kernels, router from the input's channels to 4 coefficients per output
    assert middle.macs_after == 256 * 8 * k * 9 + 4 * 8 * k * 9 + 8 * k * 4
    assert last.macs_after == 256 * k * 4 + 4 * k * 4 + k * 4 * 4


@pytest.mark.parametrize("network", networks.NETWORKS)
@pytest.mark.parametrize("method", ["static", "dynet"])
def test_planned_costs_are_those_of_the_network_that_is_built(network, method):
    net, x = networks.make(network)
    plan = make_plan(net, x, "60%", method)
    student = convert(net, plan)
    assert plan.macs_before == measure_macs(net, x)
    assert plan.macs_after == measure_macs(student, x)
    assert plan.params_before == count_params(net)
    assert plan.params_after == count_params(student)


def test_a_search_pays_only_for_the_layers_that_a_step_changes(monkeypatch):
    """A search asks for a hundred thousand costs of a DenseNet-121; computing all of its layers took minutes."""
    net = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 1, bias=False) for i in range(10)))
    graph = trace(net, torch.zeros(1, 3, 4, 4))
    model = CostModel(graph, static_choices(graph, Static()))
    keep = widths(graph)
    assert model.macs(keep) == 16 * (3 * 8 + 9 * 8 * 8)
    seen = []
    site = CostModel.site
    monkeypatch.setattr(CostModel, "site", lambda self, op, keep: seen.append(op.module) or site(self, op, keep))
    group = next(g for g, found in enumerate(graph.groups) if found.name == "4")
    keep[group] = 5
    assert model.macs(keep) == 16 * (3 * 8 + 7 * 8 * 8 + 2 * 5 * 8)
    assert model.params(keep) == 3 * 8 + 7 * 8 * 8 + 2 * 5 * 8
    assert seen == ["4", "5"]  # what writes these channels, and what reads them


def test_a_network_is_counted_as_it_is_called():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x, *, twice=False):
            return self.conv(x) + self.conv(x) if twice else self.conv(x)

    x = torch.zeros(1, 3, 5, 5)
    found = [measure_macs(Scaled(), example) for example in (x, {"x": x, "twice": True})]
    assert found == [3 * 4 * 25, 2 * 3 * 4 * 25]
    assert all(type(macs) is int for macs in found)


def test_a_layer_that_runs_at_two_sizes_pays_for_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.first(x)
            return self.conv(x).mean((2, 3)) + self.conv(x[:, :, ::2, ::2]).mean((2, 3))

    graph = trace(Twice(), torch.zeros(1, 3, 8, 8))
    cost = CostModel(graph, static_choices(graph, Static())).layers(widths(graph))["conv"][0]
    assert cost.total == 8 * 8 * 9 * (64 + 16)


def test_the_first_difference_between_a_plan_and_a_network():
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 1)), torch.zeros(1, 3, 4, 4))
    shapes = {"0.weight": (8, 3, 1, 1), "0.bias": (8,)}
    assert fits(graph, shapes) == ""
    assert fits(graph, {"0.weight": (8, 3, 1, 1)}) == "the network has no parameter '0.bias'"
    assert (
        fits(graph, {**shapes, "0.weight": (8, 3, 3, 3)})
        == "'0.weight' has shape (8, 3, 3, 3), the plan expects (8, 3, 1, 1)"
    )
    assert fits(graph, {**shapes, "1.bias": (4,)}) == "the plan knows no parameter '1.bias'"


@pytest.mark.parametrize("method", ["static", "dynet"])
def test_ptflops_counts_the_same(method):
    """Its `aten` backend: the default one doesn't see a functional convolution, and would report a bogus saving."""
    net, x = networks.make(networks.Residual)
    student = convert(net, make_plan(net, x, "50%", method))
    counted, _ = get_model_complexity_info(
        student, (3, 16, 16), backend="aten", as_strings=False, print_per_layer_stat=False
    )
    own = measure_macs(student, x)
    assert own < counted < 1.03 * own  # aten adds one operation per bias and element of the pooling
