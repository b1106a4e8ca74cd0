from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import networks
from dyncompress.errors import DynCompressError, PlanError
from dyncompress.narrowing import positions
from dyncompress.taylor import taylor
from dyncompress.tracing import trace


def squares(net, batch):
    return net(batch).square().sum()


def test_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 1.0]).view(2, 1, 1, 1))
        net[1].weight.copy_(torch.tensor([3.0, -1.0]).view(1, 2, 1, 1))
    x = torch.ones(1, 1, 1, 1)
    # out = 3 - 1 = 2, loss 4, dL/dout = 4: w dL/dw is 3 * 4 and -1 * 4, so |12| and |-4|, over their mean 8
    (scores,) = taylor(net, trace(net, x), [x], squares)
    assert np.allclose(scores, [1.5, 0.5])


def test_batches_are_averaged_after_the_absolute_value():
    """Two images that pull a channel in opposite directions both need it."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 1.0]).view(2, 1, 1, 1))
        net[1].weight.copy_(torch.tensor([2.0, 1.0]).view(1, 2, 1, 1))
    x = torch.ones(1, 1, 1, 1)
    loss = lambda net, batch: net(batch).sum()  # noqa: E731
    (scores,) = taylor(net, trace(net, x), [x, -x], loss)
    assert np.allclose(scores, [4 / 3, 2 / 3])


def faded(net, graph, group, channel, factor):
    """A copy in which everything that reads one channel of a group reads it weaker."""
    copied = copy.deepcopy(net)
    transposed = {op.weight for op in graph.operations if op.kind == "conv_transpose"}
    every = [range(g.channels) for g in graph.groups]
    rest = [[c for c in kept if (g, c) != (group, channel)] for g, kept in enumerate(every)]
    for key, runs in graph.axes.items():
        name, dim = key.rsplit(":", 1)
        if name.endswith("weight") and int(dim) == (0 if name in transposed else 1):
            of_it = torch.tensor(sorted({*positions(runs, every)} - {*positions(runs, rest)}), dtype=torch.int64)
            weight = copied.get_parameter(name).data
            weight.index_copy_(int(dim), of_it, weight.index_select(int(dim), of_it) * factor)
    return copied


@pytest.mark.parametrize(
    "network",
    [networks.Residual, networks.Inverted, networks.Dense, networks.Grouped, networks.UNet, networks.Flatten,
     networks.Shuffle, networks.ZeroPad],
)  # fmt: skip
@torch.no_grad()
def test_against_finite_differences(network):
    """The slope of the loss as everything that reads a channel fades: to cut the channel is to fade it to nothing."""
    net, x = networks.make(network)
    graph = trace(net, x)
    net, x = net.double(), x.double()

    def loss(net, batch):
        out = net(batch)
        return (out["out"] if isinstance(out, dict) else out).square().sum()

    def slope(group, channel, step=1e-4):
        up, down = (loss(faded(net, graph, group, channel, 1 + s), x) for s in (step, -step))
        return abs(float(up - down)) / (2 * step)

    expected = [[slope(g, c) for c in range(group.channels)] for g, group in enumerate(graph.groups)]
    for found, wanted in zip(taylor(net, graph, [x], loss), expected, strict=True):
        assert np.allclose(found, np.array(wanted) / np.mean(wanted), rtol=1e-4, atol=1e-6)


def test_labelled_batches_need_no_loss():
    net, x = networks.make(networks.Residual)
    graph = trace(net, x)
    labels = torch.tensor([0, 3])
    plain = taylor(net, graph, [(x, labels)])
    explicit = taylor(net, graph, [(x, labels)], lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))
    assert all(np.allclose(a, b) for a, b in zip(plain, explicit, strict=True))
    with pytest.raises(DynCompressError, match=r"allowed: \(inputs, labels\)"):
        taylor(net, graph, [x])


def test_frozen_layers_count_and_the_network_is_left_alone():
    net, x = networks.make(networks.PReLUFrozen)
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    scores = taylor(net, trace(net, x), [x], squares)
    assert all((s > 0).any() for s in scores)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training and not net.stem[0].weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("batches", "loss", "said"),
    [
        ([], squares, "needs batches, and got none"),
        ([0], lambda net, batch: torch.tensor(1.0), "a scalar tensor with a gradient"),
        ([0], lambda net, batch: 1.0, "a scalar tensor with a gradient"),
        ([0], lambda net, batch: sum(p.sum() for p in net.parameters()) * float("nan"), "the loss is nan on batch 1"),
    ],
)
def test_what_has_no_gradient(batches, loss, said):
    net, x = networks.make(networks.Residual)
    with pytest.raises(PlanError) as raised:
        taylor(net, trace(net, x), batches, loss)
    assert said in str(raised.value)
