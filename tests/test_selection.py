from __future__ import annotations

import pytest
import torch
from torch import nn

import networks
from dyncompress.errors import PlanError
from dyncompress.planning import make_plan
from dyncompress.selection import named, smallest
from dyncompress.tracing import trace

X = torch.zeros(1, 3, 16, 16)


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 10, 1))


def test_names_globs_and_types():
    net, x = networks.make(networks.Residual)
    graph = trace(net, x)
    assert set(named(net, graph, ["blocks.1.*"], "ignore")) == {"blocks.1.conv1", "blocks.1.conv2", "blocks.1.down.0"}
    assert (
        named(net, graph, [nn.Linear], "ignore") == named(net, graph, ["Linear"], "ignore") == {"head.linear": "Linear"}
    )
    assert named(net, graph, "stem.0", "ignore") == {"stem.0": "stem.0"}


def test_what_matches_nothing_is_answered_with_the_nearest():
    net, x = networks.make(networks.Residual)
    with pytest.raises(PlanError, match=r"static 'steem.0' matches no layer; .*near: stem.0"):
        named(net, trace(net, x), ["steem.0"], "static")


@pytest.mark.parametrize(
    ("floors", "expected"),
    [
        ({}, [8, 8]),
        ({"0": 24}, [24, 8]),
        ({"0": 0.5}, [16, 8]),
        ({"2": 0.7}, [8, 45]),  # 44.8 channels
        ({"*": 0.25}, [8, 16]),
        ({"*": 1.0}, [32, 64]),
        ({"0": 1}, [8, 8]),  # one channel, and not all of them
        ({"*": 40}, [32, 40]),  # a narrower layer keeps all that it has
        ({"0": 0.5, "[02]": 12}, [16, 12]),  # the larger of two floors
        ({"4": 10}, [8, 8]),  # the network's output keeps its width anyway
    ],
)
def test_floors_by_hand(floors, expected):
    net = chain()
    assert smallest(net, trace(net, X), floors, 8) == expected


def test_more_than_there_is():
    net = chain()
    with pytest.raises(PlanError, match=r"floors '\[04\]': 33 channels, of layers that have 32; give 1 to 32"):
        smallest(net, trace(net, X), {"[04]": 33}, 8)


def test_a_floor_of_a_grouped_convolution_counts_its_own_channels():
    net, x = networks.make(networks.Grouped)
    graph = trace(net, x)
    least = smallest(net, graph, {"body.1.0": 30}, 1)
    row = next(op for op in graph.operations if op.module == "body.1.0")
    fixed, parts = row.axes[0]
    assert fixed + sum(least[g] * each for g, each in parts) >= 30


@pytest.mark.parametrize("floor", [0, -1, 0.0, 1.5, True, "half", None])
def test_what_is_no_floor(floor):
    net = chain()
    with pytest.raises(PlanError, match=r"is no width; give channels as an integer from 1, or a share"):
        smallest(net, trace(net, X), {"0": floor}, 8)


def test_floors_are_a_mapping():
    net = chain()
    with pytest.raises(PlanError, match=r"no mapping; give layers and widths"):
        smallest(net, trace(net, X), ["0"], 8)


@pytest.mark.parametrize(
    "network", [networks.Residual, networks.Inverted, networks.UNet, networks.Dense, networks.Grouped]
)
@pytest.mark.parametrize("allocation", ["uniform", "importance"])
def test_floors_are_kept_and_the_target_is_met_elsewhere(network, allocation):
    net, x = networks.make(network)
    free = make_plan(net, x, "40%", "static", allocation=allocation)
    name = min(free.layers, key=lambda row: row.out_after / row.out_before).name  # what was cut most
    plan = make_plan(net, x, "40%", "static", allocation=allocation, floors={name: 0.8})
    row = next(row for row in plan.layers if row.name == name)
    assert row.out_after >= 0.8 * row.out_before
    assert plan.ratio <= 0.4
