from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import networks
from dyncompress.layers import get_method
from dyncompress.marginal import Terms
from dyncompress.planning import Problem
from dyncompress.tracing import trace


def test_two_layers_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1))
    problem = Problem(net, trace(net, torch.zeros(1, 3, 10, 10)), get_method("static"))
    # with widths a, b: 100 * (27 a + a b + 4 b) MACs
    macs = Terms(problem.model, "macs").expand([8, 6])
    assert macs.value == 100 * (27 * 8 + 8 * 6 + 4 * 6)
    assert macs.slope.tolist() == [100 * (27 + 6), 100 * (8 + 4)]
    assert macs.curvature.tolist() == [[0, 100], [100, 0]]
    # 27 a + a b + 4 b weights, a + b + 4 biases
    params = Terms(problem.model, "params").expand([8, 6])
    assert params.value == 27 * 8 + 48 + 24 + 18
    assert params.slope.tolist() == [27 + 6 + 1, 8 + 4 + 1]
    assert macs.steps(np.array([[-2], [-3]])).tolist() == [[-2 * 3300], [-3 * 1200]]
    macs.move(0, -2)
    assert macs.value == 100 * (27 * 6 + 6 * 6 + 4 * 6)
    assert macs.slope.tolist() == [3300, 100 * (6 + 4)]


@pytest.mark.parametrize("network", networks.NETWORKS)
@pytest.mark.parametrize("method", ["static", "dynet"])
@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_expansions_are_exact_where_they_stand_and_near_elsewhere(network, method, quantity):
    net, x = networks.make(network)
    problem = Problem(net, trace(net, x), get_method(method))
    terms, draw = Terms(problem.model, quantity), np.random.default_rng(0)
    here = terms.expand(problem.full)
    assert here.value == getattr(problem.model, quantity)(problem.full)
    for _ in range(8):
        keep = [int(draw.integers(c // 2, c + 1)) for c in problem.full]
        d = np.array(keep) - np.array(problem.full)
        expected = here.value + here.slope @ d + d @ here.curvature @ d / 2
        # a static cost is quadratic; of a router that a block shares, the expansion knows the slope only
        assert expected == pytest.approx(terms.exact(keep), rel=1e-3 if method == "static" else 5e-2)
