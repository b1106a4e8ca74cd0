"""The channel graph, on networks that cover the ways in which channels travel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graph_checks
import networks
from dyncompress.errors import TraceError
from dyncompress.narrowing import cut
from dyncompress.tracing import trace


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_something_can_be_cut_and_the_cut_network_runs(network):
    net, x = networks.make(network)
    with graph_checks.left_as_it_was(net):
        graph = trace(net, x)
        assert graph.groups
        graph_checks.smaller_and_runs(net, graph, x)


@pytest.mark.parametrize("network", networks.BATCH_NORMED)
def test_cutting_equals_zeroing_what_reads_the_channels(network):
    """The index maps are right: shapes alone would not show a wrong one."""
    net, x = networks.make(network)
    graph = trace(net, x)
    if graph.rescaled:
        pytest.skip(f"counts its channels: {graph.rescaled[0]}")
    graph_checks.equals_zeroed(net, graph, x, {})


def test_residual_streams_are_cut_together_and_inner_widths_alone():
    graph = trace(*networks.make(networks.Residual))
    sizes = {g.name: g.channels for g in graph.groups}
    assert sizes == {
        "stem.0": 16,
        "blocks.0.conv1": 16,
        "blocks.1.conv1": 32,
        "blocks.1.conv2": 32,
        "blocks.2.conv1": 32,
    }
    assert graph.pinned == {"head.linear": "output of the network"}
    blocks = {op.module: op.block for op in graph.convs}
    assert blocks["blocks.1.conv1"] == blocks["blocks.1.down.0"] == "blocks.1"
    assert blocks["stem.0"] == ""
    norms = {op.module: op.norm for op in graph.convs}
    assert norms["blocks.0.conv2"] == "blocks.0.bn2"


def test_padded_channels_are_cut_where_the_padding_is_a_module():
    graph = trace(*networks.make(networks.ZeroPad))
    assert list(graph.seams) == ["pad"]
    # 16 channels of the stem go on through the middle of the pad; the 8 + 8 new ones are a group of their own
    assert sorted(g.channels for g in graph.groups) == [16, 16, 32]
    inline = trace(*networks.make(networks.InlineZeroPad))
    assert sorted(g.channels for g in inline.groups) == [16, 32]


def test_what_the_code_counts_is_pinned_with_its_reason():
    graph = trace(*networks.make(networks.HardView))
    assert [g.name for g in graph.groups] == ["body.0"]
    assert "view" in graph.pinned["last.0"] or "shape" in graph.pinned["last.0"]


def test_grouped_convolutions_keep_their_groups_equal():
    net, x = networks.make(networks.Grouped)
    graph = trace(net, x)
    kept = graph_checks.thirds(graph)
    cut(net, graph, kept)
    conv = net.body[1][0]
    assert conv.groups == 4 and conv.in_channels % 4 == 0 == conv.out_channels % 4
    assert conv.weight.shape[1] == conv.in_channels // 4


def test_a_convolution_that_runs_twice_stands_for_both_calls():
    graph = trace(*networks.make(networks.Twice))
    (shared,) = [op for op in graph.operations if op.module == "shared.0"]
    assert shared.spec is not None
    assert shared.runs == ((256, 1), (256, 1))
    assert shared.block == "", "a router can't be shared between calls"


def test_tracing_leaves_modes_and_random_numbers_alone():
    net, x = networks.make(networks.Residual)
    net.train()
    net.stem.eval()
    modes = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    trace(net, x)
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("example", [{"x": torch.zeros(1, 3, 16, 16)}, (torch.zeros(1, 3, 16, 16),)])
def test_examples_as_keywords_and_as_tuples(example):
    net, _ = networks.make(networks.Residual)
    assert len(trace(net, example).groups) == 5


def test_errors_say_what_failed():
    net, _ = networks.make(networks.Residual)
    with pytest.raises(TraceError, match=r"Residual fails on the example \(\(1, 4, 16, 16\)\).*pass an example"):
        trace(net, torch.zeros(1, 4, 16, 16))
    with pytest.raises(TraceError, match="Linear runs no convolution"):
        trace(nn.Linear(3, 4), torch.zeros(1, 3))
    with pytest.raises(TraceError, match="can't trace a str"):
        trace("resnet18", torch.zeros(1, 3))


def test_pooling_in_channels_last_order():
    class Pooled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(memory_format=torch.channels_last))

    net = Pooled(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    assert trace(net, torch.randn(1, 3, 8, 8)).pinned == {"3": "output of the network"}


@pytest.mark.parametrize(
    "pick",
    [
        lambda x: x[:, :, x[0, 0, 0] > 0],  # by content: any number of columns
        lambda x: x[:, torch.tensor([3, 1, 2])],  # channels by number
        lambda x: x[:, 2:5],
        lambda x: torch.sort(x, dim=1).values,  # no rule
        lambda x: torch.einsum("bchw,bdhw->bcd", x, x)[..., None],
    ],
)
def test_what_cannot_be_followed_is_pinned_and_the_rest_is_cut(pick):
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.picked = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)

        def forward(self, x):
            return pick(self.picked(torch.relu(self.first(x)))).mean((1, 2, 3))

    torch.manual_seed(0)
    graph = trace(Picks(), torch.randn(1, 3, 12, 12))
    assert "first" in [g.name for g in graph.groups]
    assert "first" not in graph.pinned


def test_fingerprint_names_names_and_shapes():
    a = trace(*networks.make(networks.Residual, seed=0)).fingerprint
    b = trace(*networks.make(networks.Residual, seed=1)).fingerprint
    assert a == b != trace(*networks.make(networks.ZeroPad)).fingerprint
