from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dyncompress.graph import trace
from dyncompress.importance import best, importance


def test_magnitude_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([3.0, 1.0]).view(2, 1, 1, 1))
        net[1].weight.copy_(torch.tensor([1.0, 1.0]).view(1, 2, 1, 1))
    (scores,) = importance(net, trace(net, torch.zeros(1, 1, 4, 4)))
    # written with norms 3 and 1 (mean 2: 1.5 and 0.5), read with norms 1 and 1: means 1.25 and 0.75
    assert np.allclose(scores, [1.25, 0.75])


def test_best_channels_ascend_and_ties_go_to_the_first():
    assert best(np.array([0.1, 0.9, 0.5, 0.9]), 2) == (1, 3)
    assert best(np.zeros(4), 2) == (0, 1)
