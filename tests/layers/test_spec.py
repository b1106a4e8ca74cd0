"""Shapes are integers that torch agrees with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, Macs

# torch's own modules say so of "same" padding and even kernels; ours pad before they convolve.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CONVS: list[tuple[nn.Conv1d | nn.Conv2d | nn.Conv3d, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3), (9, 9)),
    (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False), (11, 13)),
    (nn.Conv2d(4, 4, 4, padding="same", groups=4), (7, 8)),
    (nn.Conv2d(4, 6, 3, padding="valid", padding_mode="reflect"), (7, 7)),
    (nn.Conv1d(4, 6, 5, stride=3, padding=2, padding_mode="circular"), (20,)),
    (nn.Conv3d(2, 2, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), padding_mode="replicate"), (3, 6, 7)),
]


@pytest.mark.parametrize(("conv", "size"), CONVS, ids=lambda value: str(value))
def test_agrees_with_torch(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, size: tuple[int, ...]) -> None:
    spec = ConvSpec.of(conv)
    assert spec.weight_shape == conv.weight.shape
    assert spec.kernel_params == conv.weight.numel()
    assert spec.bias == (conv.bias is not None)
    assert spec.is_depthwise == (conv.groups == conv.in_channels)
    assert spec.output_size(size) == conv(torch.zeros(1, conv.in_channels, *size)).shape[2:]


def test_omitted_arguments_are_those_of_torch() -> None:
    assert ConvSpec(4, 6, (3, 3)) == ConvSpec.of(nn.Conv2d(4, 6, 3))


def test_same_padding_puts_the_odd_one_after() -> None:
    # A kernel of 4 with dilation 1 needs 3 in all: 1 before, 2 after. One of 3 with dilation 2 needs 4.
    assert ConvSpec(1, 1, (4, 3), padding="same", dilation=(1, 2)).pads == ((1, 2), (2, 2))


def test_one_group_of_one_channel_is_no_depthwise_convolution() -> None:
    assert not ConvSpec(1, 8, (3, 3)).is_depthwise
    assert ConvSpec(2, 8, (3, 3), groups=2).is_depthwise


def test_pointwise_is_one_matrix_product() -> None:
    assert ConvSpec(4, 6, (1, 1), padding="same").is_pointwise
    assert ConvSpec(4, 6, (1, 1), dilation=(2, 2)).is_pointwise
    assert not ConvSpec(4, 6, (1, 1), stride=(2, 1)).is_pointwise
    assert not ConvSpec(4, 6, (1, 1), padding=(0, 1)).is_pointwise
    assert not ConvSpec(4, 6, (1, 1), groups=2).is_pointwise
    assert not ConvSpec(4, 6, (1, 3)).is_pointwise


def test_reads_well() -> None:
    spec = ConvSpec(4, 6, (3, 5), (2, 1), (1, 1), (3, 3), 2, bias=False, padding_mode="reflect")
    assert str(spec) == "4 -> 6, 3x5, stride 2x1, padding 1, reflect, dilation 3, groups 2, no bias"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kernel_size": ()}, "dimensions"),
        ({"kernel_size": (1, 1, 1, 1)}, "dimensions"),
        ({"kernel_size": (3, 0)}, "kernel_size"),
        ({"stride": (1,)}, "stride"),
        ({"dilation": (0, 1)}, "dilation"),
        ({"in_channels": 0}, "in_channels"),
        ({"groups": -1}, "groups"),
        ({"groups": 4}, "out_channels 6"),
        ({"padding": (1,)}, "padding"),
        ({"padding": (-1, 0)}, "padding"),
        ({"padding": "full"}, "'full'"),
        ({"padding": "same", "stride": (2, 2)}, "stride"),
        ({"padding_mode": "mirror"}, "'mirror'"),
    ],
)
def test_what_is_no_convolution_is_refused(change: dict[str, Any], word: str) -> None:
    arguments = {"in_channels": 8, "out_channels": 6, "kernel_size": (3, 3)} | change
    with pytest.raises(DynCompressError, match=word):
        ConvSpec(**arguments)


def test_a_site_has_positions() -> None:
    with pytest.raises(DynCompressError, match="stem: positions 0"):
        ConvSite("stem", ConvSpec(4, 6, (3, 3)), positions=0)


def test_macs_add_up() -> None:
    assert Macs(conv=5, kernels=3, router=2).total == 10
    assert Macs(conv=5).total == 5
