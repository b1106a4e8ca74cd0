from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dyncompress.narrowing import Reindex, cut, encode, length, positions


def test_runs_of_two_groups_around_fixed_channels():
    groups, indices = [0, 0, 0, -1, -1, 1, 1, 0], [0, 1, 2, 0, 0, 4, 5, 7]
    runs = encode(groups, indices)
    assert runs == ((0, 0, 3, 1), (-1, 0, 2, 1), (1, 4, 2, 1), (0, 7, 1, 1))
    assert length(runs) == 8
    # group 0 keeps channels 1 and 7, group 1 keeps 5: positions 1, the fixed 3 and 4, 6, and 7
    assert positions(runs, [(1, 7), (5,)]) == [1, 3, 4, 6, 7]


def test_flattened_positions_repeat_their_channel():
    runs = encode([0] * 6, [0, 0, 1, 1, 2, 2])
    assert runs == ((0, 0, 3, 2),)
    assert positions(runs, [(0, 2)]) == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("module", "axes", "expected"),
    [
        (
            nn.Conv2d(8, 6, 3),
            {"weight:0": 6, "weight:1": 8, "bias:0": 6},
            {"in_channels": 4, "out_channels": 3},
        ),
        (
            nn.Conv2d(1, 6, 3),
            {"weight:0": 6, "bias:0": 6},
            {"in_channels": 1, "out_channels": 3, "groups": 1},
        ),
        (nn.Conv2d(8, 8, 3, groups=8), {"weight:0": 8, "bias:0": 8}, {"in_channels": 4, "groups": 4}),
        (
            nn.ConvTranspose2d(8, 6, 2),
            {"weight:0": 8, "weight:1": 6, "bias:0": 6},
            {"in_channels": 4, "out_channels": 3},
        ),
        (nn.Linear(8, 6), {"weight:1": 8, "weight:0": 6, "bias:0": 6}, {"in_features": 4, "out_features": 3}),
        (
            nn.BatchNorm1d(8),
            {f"{n}:0": 8 for n in ("weight", "bias", "running_mean", "running_var")},
            {"num_features": 4},
        ),
        (nn.GroupNorm(2, 8), {"weight:0": 8, "bias:0": 8}, {"num_channels": 4}),
        (nn.LayerNorm(8), {"weight:0": 8, "bias:0": 8}, {"normalized_shape": (4,)}),
        (nn.PReLU(8), {"weight:0": 8}, {"num_parameters": 4}),
    ],
)
def test_modules_learn_their_widths_and_parameters_keep_their_identity(module, axes, expected):
    net = nn.ModuleDict({"m": module})
    identities = [id(p) for p in net.parameters()]
    sizes = sorted(set(axes.values()))
    runs = {f"m.{key}": ((sizes.index(size), 0, size, 1),) for key, size in axes.items()}
    cut(net, SimpleNamespace(axes=runs, seams={}, counts={}), [range(0, size, 2) for size in sizes])
    assert {name: getattr(module, name) for name in expected} == expected
    assert [id(p) for p in net.parameters()] == identities


def test_reindex_shows_the_code_the_channels_that_it_counts():
    class Pad(nn.Module):
        def forward(self, x):
            assert x.shape[1] == 3
            return nn.functional.pad(x, (0, 0, 1, 1))

    module = Reindex(Pad(), channels=3, entering=[0, 2], leaving=[1, 3, 4])
    x = torch.tensor([[[10.0], [30.0]]])  # channels 0 and 2 of three
    # padded: 0, 10, (cut) 0, 30, 0 -> channels 1, 3, 4
    assert module(x).flatten().tolist() == [10.0, 30.0, 0.0]
    assert not module.state_dict()
    assert module.double()(x.double()).dtype == torch.float64
