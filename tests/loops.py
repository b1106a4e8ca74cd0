"""Per-sample convolutions by the plainest means, to compare with: a loop over the samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from dyncompress.layers import ConvSite, ConvSpec, Static
from dyncompress.layers.execution import Strategy, dynamic_conv

MODES = ("reflect", "replicate", "circular")
POINTWISE = ConvSpec(6, 4, (1, 1))
SPECS = [
    POINTWISE,
    ConvSpec(6, 4, (3, 3), padding=(1, 1)),
    ConvSpec(6, 4, (3, 5), (2, 1), (1, 2), (1, 2), groups=2, bias=False),
    ConvSpec(4, 8, (3, 3), padding="valid", groups=4),
    ConvSpec(4, 2, (4, 3), padding="same", dilation=(1, 2)),
    ConvSpec(4, 6, (3,), (2,), (2,)),
    ConvSpec(2, 4, (3, 3, 3), (1, 2, 1), (1, 1, 0)),
    *(ConvSpec(2, 4, (4,), padding="same", padding_mode=mode) for mode in MODES),
    *(ConvSpec(2, 4, (3, 4), (2, 1), (1, 2), padding_mode=mode) for mode in MODES),
    *(ConvSpec(2, 2, (3, 2, 3), padding="same", padding_mode=mode) for mode in MODES),
]


def tensors(spec: ConvSpec, batch: int, g: int = 3) -> list[Tensor]:
    """Random x, bank and eta, and a bias if the spec has one."""
    x = torch.randn(batch, spec.in_channels, *(7, 8, 6)[: spec.ndim])
    bank = torch.randn(spec.out_channels, g, *spec.weight_shape[1:])
    eta = torch.rand(batch, spec.out_channels, g)
    bias = [torch.randn(spec.out_channels)] if spec.bias else []
    return [tensor.requires_grad_() for tensor in (x, bank, eta, *bias)]


def run(spec: ConvSpec, strategy: Strategy | None, given: list[Tensor]) -> Tensor:
    x, bank, eta, *bias = given
    return dynamic_conv(x, bank, eta, bias[0] if bias else None, spec, strategy)


def loop(spec: ConvSpec, given: list[Tensor]) -> Tensor:
    """torch's own module on each sample in turn, with a weight that is put together kernel by kernel."""
    x, bank, eta, *bias = given
    (conv,) = Static().build([ConvSite("conv", spec, positions=1)])
    outputs = []
    for sample, mix in zip(x, eta, strict=True):
        weight = torch.stack([torch.einsum("i,i...->...", m, kernels) for m, kernels in zip(mix, bank, strict=True)])
        parameters = dict(zip(("weight", "bias"), (weight, *bias), strict=False))
        outputs.append(functional_call(conv, parameters, sample.unsqueeze(0)))
    return torch.cat(outputs)


def assert_equals_loop(spec: ConvSpec, strategy: Strategy | None, given: list[Tensor]) -> None:
    result, expected = run(spec, strategy, given), loop(spec, given)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(result, given, cotangent)
    theirs = torch.autograd.grad(expected, given, cotangent)
    for a, b in zip((result, *ours), (expected, *theirs), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)
