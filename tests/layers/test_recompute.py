"""Kernels that backward mixes again: the same gradients, and no kernel waits for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dyncompress.layers import ConvSpec, execution
from loops import POINTWISE, SPECS, assert_equals_loop, run, tensors

BATCH = 5  # chunks of 4 and 1


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of one image already fill a chunk, which then has 4 images."""
    monkeypatch.setattr(execution, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(execution, "_CHUNK_IMAGES", 4)


def kept(spec: ConvSpec, given: list[Tensor]) -> int:
    """Numbers that autograd keeps for backward, each tensor once."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(spec, None, given)
    return sum(found.values())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_equal_those_of_the_loop(spec: ConvSpec) -> None:
    assert_equals_loop(spec, None, tensors(spec, BATCH))


@pytest.mark.parametrize("spec", [POINTWISE, SPECS[1]], ids=str)
def test_no_kernel_is_kept(spec: ConvSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(spec, BATCH)
    whole = kept(spec, given)
    monkeypatch.setattr(execution, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(execution, "_CHUNK_IMAGES", 4)
    x, bank, eta, *_ = given
    assert kept(spec, given) == x.numel() + bank.numel() + eta.numel()
    assert whole >= kept(spec, given) + BATCH * spec.kernel_params


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("spec", [ConvSpec(2, 2, (1,)), ConvSpec(2, 2, (3,), padding=(1,), bias=False)], ids=str)
def test_gradients_have_gradients(spec: ConvSpec) -> None:
    x = torch.randn(BATCH, 2, 3, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(2, 2, *spec.weight_shape[1:], dtype=torch.float64, requires_grad=True)
    eta = torch.rand(BATCH, 2, 2, dtype=torch.float64, requires_grad=True)

    def convolve(*given: Tensor) -> Tensor:
        return run(spec, None, list(given))

    assert torch.autograd.gradcheck(convolve, (x, bank, eta))
    assert torch.autograd.gradgradcheck(convolve, (x, bank, eta))


@pytest.mark.usefixtures("small_chunks")
def test_transforms_of_functions_work() -> None:
    spec = SPECS[1]
    x, bank, eta, bias = (t.detach() for t in tensors(spec, BATCH))

    def loss(bank: Tensor) -> Tensor:
        return run(spec, None, [x, bank, eta, bias]).square().sum()

    found = torch.func.grad(loss)(bank)
    expected = torch.autograd.grad(loss(bank.requires_grad_()), bank)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("spec", [POINTWISE, SPECS[1]], ids=str)
def test_under_autocast_gradients_have_the_dtypes_of_what_they_belong_to(spec: ConvSpec) -> None:
    given = tensors(spec, BATCH)
    exact = torch.autograd.grad(run(spec, None, given).sum(), given)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(spec, None, given)
    assert out.dtype == torch.bfloat16
    for found, expected in zip(torch.autograd.grad(out.sum(), given), exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.usefixtures("small_chunks")
def test_what_is_frozen_gets_no_gradient() -> None:
    x, bank, eta, bias = tensors(SPECS[1], BATCH)
    out = run(SPECS[1], None, [x.detach(), bank, eta.detach(), bias])
    expected = torch.autograd.grad(out.sum(), bank)[0]
    out = run(SPECS[1], None, [x, bank.detach(), eta, bias])
    assert torch.autograd.grad(out.sum(), eta)[0].shape == eta.shape
    assert expected.shape == bank.shape
