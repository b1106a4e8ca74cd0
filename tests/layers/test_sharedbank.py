"""Banks whose rows are not output channels: every way to run them equals a loop over samples, gradients too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from dyncompress.layers import CondConv, ConvSite, ConvSpec, Static, execution
from dyncompress.layers.execution import Strategy, dynamic_conv
from tests.loops import SPECS

# torch's own advice on even kernels, to those that compare with torch's own modules
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def tensors(spec: ConvSpec, batch: int, taps: bool) -> list[Tensor]:
    x = torch.randn(batch, spec.in_channels, *(7, 8, 6)[: spec.ndim])
    rows, kernel = (math.prod(spec.kernel_size), (1,) * spec.ndim) if taps else (1, spec.kernel_size)
    bank = torch.randn(rows, 3, *spec.weight_shape[:2], *kernel)
    given = [x, bank, torch.rand(batch, rows, 3), *([torch.randn(spec.out_channels)] if spec.bias else [])]
    return [tensor.requires_grad_() for tensor in given]


def loop(spec: ConvSpec, given: list[Tensor]) -> Tensor:
    """torch's own module on each sample, with a weight that is put together tap by tap."""
    x, bank, eta, *bias = given
    (conv,) = Static().build([ConvSite("conv", spec, positions=1)])
    outputs = []
    for sample, mix in zip(x, eta, strict=True):
        taps = [torch.einsum("k,k...->...", m, kernels) for m, kernels in zip(mix, bank, strict=True)]
        weight = taps[0] if len(taps) == 1 else torch.stack([tap.flatten(1) for tap in taps], -1)
        parameters = dict(zip(("weight", "bias"), (weight.reshape(spec.weight_shape), *bias), strict=False))
        outputs.append(functional_call(conv, parameters, sample.unsqueeze(0)))
    return torch.cat(outputs)


def assert_equals_loop(spec: ConvSpec, strategy: Strategy | None, given: list[Tensor]) -> None:
    x, bank, eta, *bias = given
    result, expected = dynamic_conv(x, bank, eta, bias[0] if bias else None, spec, strategy), loop(spec, given)
    cotangent = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, given, cotangent) for out in (result, expected))
    for a, b in zip((result, *ours), (expected, *theirs), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_strategy_equals_the_loop(spec: ConvSpec, taps: bool) -> None:
    strategies: list[Strategy | None] = [None, "grouped", "features"]
    for strategy in [*strategies, *(["bmm"] if spec.is_pointwise else [])]:
        assert_equals_loop(spec, strategy, tensors(spec, 3, taps))  # type: ignore[arg-type]
    assert_equals_loop(spec, "single", tensors(spec, 1, taps))


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_chunks_that_keep_no_kernels_equal_the_loop(
    spec: ConvSpec, taps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(execution, "_CHUNK_IMAGES", 2)
    given = tensors(spec, 5, taps)
    assert_equals_loop(spec, None, given)
    with torch.no_grad():
        x, bank, eta, *bias = given
        result = dynamic_conv(x, bank, eta, bias[0] if bias else None, spec)
        assert (result - loop(spec, given)).abs().max() <= 1e-5 * result.abs().max().clamp(min=1)


@pytest.mark.parametrize("taps", [False, True])
def test_no_sample_gives_no_output_and_zero_gradients(taps: bool) -> None:
    spec = ConvSpec(6, 4, (3, 3), padding=(1, 1))
    x, bank, eta, bias = given = tensors(spec, 0, taps)
    result = dynamic_conv(x, bank, eta, bias, spec)
    assert result.shape == (0, 4, 7, 8)
    assert not any(gradient.any() for gradient in torch.autograd.grad(result.sum(), given))


def test_kernels_start_from_spare_filters() -> None:
    """Kernel i is the static one, plus how much its atom differs from the mean atom."""
    layer: CondConv | torch.nn.Module = CondConv(2).build([ConvSite("conv", ConvSpec(2, 1, (1, 1)), 64)])[0]
    layer.load_static(
        torch.tensor([3.0, 0.0]).reshape(1, 2, 1, 1), None, spare=torch.tensor([[0.0, 7.0]])[..., None, None]
    )
    first, second = layer.bank.flatten(1)[0].reshape(2, 2).tolist()
    # Atoms (3, 0) and (0, 3), the spare one at the norm of the filter: mean (1.5, 1.5); noise of 0.2 rms is left out.
    assert first == pytest.approx([4.5, -1.5], abs=1.5)
    assert second == pytest.approx([1.5, 1.5], abs=1.5)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx([3.0, 0.0], abs=1e-6)
