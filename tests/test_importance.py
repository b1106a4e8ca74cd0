from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import networks
from dyncompress.errors import PlanError
from dyncompress.importance import best, importance, norm_scales
from dyncompress.ranking import rank
from dyncompress.tracing import trace


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


def scaled(*gammas: list[float]) -> nn.Sequential:
    """1x1 convolutions in a row, each but the last with a BatchNorm of these scales."""
    widths = [3, *map(len, gammas)]
    layers = [
        layer
        for i, o, gamma in zip(widths, widths[1:], gammas, strict=False)
        for layer in (nn.Conv2d(i, o, 1), nn.BatchNorm2d(o))
    ]
    for norm, gamma in zip(layers[1::2], gammas, strict=True):
        norm.weight.data = torch.tensor(gamma)
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 2, 1)).eval()


def test_norm_scales_by_hand():
    net = scaled([1.0, -3.0], [0.1, 0.2, 0.3])
    first, second = norm_scales(net, trace(net, torch.zeros(1, 3, 4, 4)))
    assert np.allclose(first, [0.5, 1.5])  # |1| and |-3|, over their mean 2
    assert np.allclose(second, [0.5, 1.0, 1.5])  # relative to the group: 0.3 there is worth as much as 3 here


def test_norm_scales_of_a_residual_group_are_averaged():
    net, x = networks.make(networks.Residual)
    graph = trace(net, x)
    scores = norm_scales(net, graph)
    at = next(g for g, group in enumerate(graph.groups) if group.name == "stem.0")  # the stem, and the first block adds
    norms = [net.stem[1].weight.detach().abs(), net.blocks[0].bn2.weight.detach().abs()]
    assert np.allclose(scores[at], sum(n / n.mean() for n in norms).numpy() / 2)


def test_a_group_without_batchnorm_is_scored_by_magnitude():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)).eval()
    graph = trace(net, torch.zeros(1, 3, 4, 4))
    assert np.allclose(norm_scales(net, graph)[1], importance(net, graph)[1])


def test_without_any_batchnorm_there_are_no_scales():
    net, x = networks.make(networks.GroupNormed)
    with pytest.raises(PlanError, match=r"no channels that can be cut pass a BatchNorm.*use 'magnitude' or 'taylor'"):
        norm_scales(net, trace(net, x))


@pytest.mark.parametrize("network", networks.BATCH_NORMED)
@pytest.mark.parametrize("name", ["magnitude", "bn", "taylor"])
def test_scores_of_all_groups_have_one_scale(network, name):
    net, x = networks.make(network)
    graph = trace(net, x)
    batches = [x] if name == "taylor" else None
    scores = rank(net, graph, name, batches, (lambda n, b: _total(n(b))) if batches else None).scores
    assert [len(s) for s in scores] == [g.channels for g in graph.groups]
    assert all(np.isfinite(s).all() and (s >= 0).all() for s in scores)
    assert [s.mean() for s in scores] == pytest.approx([1.0] * len(scores))


def _total(output) -> torch.Tensor:
    return sum(o.square().sum() for o in (output.values() if isinstance(output, dict) else [output]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("random",), "'random' is unknown; choose one of magnitude, bn, taylor"),
        (("taylor",), "'taylor' needs data: pass batches="),
        (("bn", [torch.zeros(1)]), "'bn' is of the weights alone; leave out batches"),
    ],
)
def test_bad_arguments(arguments, said):
    net, x = networks.make(networks.Residual)
    with pytest.raises(PlanError) as raised:
        rank(net, trace(net, x), *arguments)
    assert said in str(raised.value)
