"""The static method builds what torch builds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSite, ConvSpec, Static, load_static

CONVS = [
    nn.Conv1d(4, 6, 5, stride=3, padding=2, padding_mode="circular"),
    nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
    nn.Conv3d(2, 2, 3, padding="same", padding_mode="replicate"),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_builds_the_same_convolution(conv: nn.Conv2d) -> None:
    spec = ConvSpec.of(conv)
    (built,) = Static().build([ConvSite("conv", spec, positions=1)])
    load_static(built, conv.weight, conv.bias, spare=torch.zeros(3, *spec.weight_shape[1:]))
    x = torch.randn(2, spec.in_channels, *(9,) * spec.ndim)
    assert str(built) == str(conv)
    assert torch.equal(built(x), conv(x))


def test_a_bias_that_is_not_given_is_zero() -> None:
    conv = nn.Conv2d(1, 2, 1)
    load_static(conv, torch.ones(2, 1, 1, 1), None)
    assert conv(torch.full((1, 1, 1, 1), 3.0)).flatten().tolist() == [3.0, 3.0]


def test_what_does_not_fit_is_refused() -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False)
    weight = torch.zeros(6, 4, 3, 3)
    with pytest.raises(DynCompressError, match=r"weight has shape \(6, 8, 3, 3\).*\(6, 4, 3, 3\)"):
        load_static(conv, torch.zeros(6, 8, 3, 3), None)
    with pytest.raises(DynCompressError, match=r"bias has shape \(6,\).*takes none"):
        load_static(conv, weight, torch.zeros(6))
    with pytest.raises(DynCompressError, match=r"spare filters have shape \(2, 8, 3, 3\).*\(n, 4, 3, 3\)"):
        load_static(conv, weight, None, spare=torch.zeros(2, 8, 3, 3))
    with pytest.raises(DynCompressError, match="Linear is no convolution"):
        load_static(nn.Linear(4, 6), weight, None)
