"""Plans land within 1 % below their target wherever any widths do, and never above it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import networks
from dyncompress.budget import Budget
from dyncompress.layers import get_method
from dyncompress.planning import Problem
from dyncompress.tracing import trace

FEW = 60_000  # combinations of widths, few enough to look at all of them


@pytest.mark.parametrize("method", ["static", "dynet"])
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_where_any_combination_of_widths_lands_the_plan_does(network, method):
    net, x = networks.make(network)
    problem = Problem(net, trace(net, x), get_method(method))
    ranges = [range(f, c + 1) for f, c in zip(problem.floors, problem.full, strict=True)]
    for quantity, share in itertools.product(("macs", "params"), (75, 50, 33, 25)):
        reach, cost = problem.reach(quantity), getattr(problem.model, quantity)
        target = share / 100 * reach.original
        if not reach.lowest <= target <= reach.highest:
            continue
        for allocation in ("uniform", "importance"):
            plan = problem.solve(Budget.parse(f"{share}% {quantity}"), allocation, 0.01)
            found = cost(plan.widths)
            assert found <= target
            if found < 0.99 * target and math.prod(map(len, ranges)) <= FEW:
                nearest = max(c for c in map(cost, itertools.product(*ranges)) if c <= target)
                assert found == nearest < 0.99 * target
            elif math.prod(map(len, ranges)) > FEW:
                assert found >= 0.99 * target


@pytest.mark.parametrize("target", ["20%", "33%, 30% params", "60%, 25% params", "30% params"])
@pytest.mark.parametrize("method", ["static", "dynet"])
def test_hundreds_of_groups_take_seconds_at_most(target, method):
    """A DenseNet of 60 layers, each reading all before it in its stage: prices move with every step."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = networks.conv_bn(3, 32, stride=2)
            self.stages = nn.ModuleList()
            width = 32
            for _ in range(3):
                layers = [networks.conv_bn(width + 16 * i, 64, 1).append(networks.conv_bn(64, 16)) for i in range(20)]
                self.stages.append(nn.ModuleList([*layers, networks.conv_bn(width + 320, width, 1)]))
            self.head = networks.Head(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for *layers, last in self.stages:
                for layer in layers:
                    x = torch.cat([x, layer(x)], 1)
                x = last(x)
            return self.head(x)

    net = Dense().eval()
    problem = Problem(net, trace(net, torch.zeros(1, 3, 32, 32)), get_method(method))
    assert len(problem.full) > 120
    calls = []
    macs = type(problem.model).macs
    problem.model.macs = lambda keep: calls.append(keep) or macs(problem.model, keep)  # type: ignore[method-assign]
    plan = problem.solve(Budget.parse(target), "uniform", 0.01)
    loads = [achieved / asked for _, asked, achieved in plan.asked]
    assert 0.99 <= max(loads) <= 1
    assert len(calls) < 100  # whole networks priced: time on any machine, without a clock
