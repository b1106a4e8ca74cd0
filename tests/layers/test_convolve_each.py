"""Kernels that are no mix of a bank's: chunks of them, made again in backward, give what torch's module gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyncompress.layers import ConvSite, ConvSpec, DyCo3d, KernelWarehouse, Static, execution
from dyncompress.layers.execution import convolve_each, run_as
from loops import POINTWISE, SPECS

BATCH = 5  # chunks of 2, 2 and 1
FEATURES = 3

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(execution, "_CHUNK_IMAGES", 2)


def tensors(spec: ConvSpec, batch: int) -> list[Tensor]:
    """x, features of each image, the matrix that makes a kernel and biases of them, and a bias."""
    numbers = spec.kernel_params + spec.out_channels
    x = torch.randn(batch, spec.in_channels, *(7, 8, 6)[: spec.ndim], dtype=torch.float64)
    given = [x, torch.randn(batch, FEATURES).to(x), torch.randn(FEATURES, numbers).to(x), torch.randn(1).to(x)]
    given[3] = given[3].repeat(spec.out_channels)
    return [t.requires_grad_() for t in given]


def maker(spec: ConvSpec, matrix: Tensor, made: list[int]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def make(features: Tensor) -> tuple[Tensor, Tensor]:
        made.append(len(features))
        kernels, biases = (features @ matrix).split((spec.kernel_params, spec.out_channels), dim=1)
        return kernels.unflatten(1, spec.weight_shape), biases

    return make


def each(spec: ConvSpec, given: list[Tensor], made: list[int]) -> Tensor:
    x, features, matrix, bias = given
    return convolve_each(x, features, maker(spec, matrix, made), bias, spec)


def loop(spec: ConvSpec, given: list[Tensor]) -> Tensor:
    """torch's own module on each image in turn."""
    x, features, matrix, bias = given
    (conv,) = Static().build([ConvSite("conv", ConvSpec(**{**vars(spec), "bias": True}), positions=1)])
    outputs = []
    for image, h in zip(x, features, strict=True):
        weight, own = (h @ matrix).split((spec.kernel_params, spec.out_channels))
        parameters = {"weight": weight.reshape(spec.weight_shape), "bias": own + bias}
        outputs.append(torch.func.functional_call(conv, parameters, image.unsqueeze(0)))
    return torch.cat(outputs)


def assert_equals_loop(spec: ConvSpec, batch: int) -> None:
    given = tensors(spec, batch)
    result, expected = each(spec, given, []), loop(spec, given)
    cotangent = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, given, cotangent) for out in (result, expected))
    for a, b in zip((result, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("batch", [1, BATCH])
def test_values_and_gradients_equal_those_of_the_loop(spec: ConvSpec, batch: int) -> None:
    assert_equals_loop(spec, batch)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_so_do_those_of_chunks(spec: ConvSpec) -> None:
    assert_equals_loop(spec, BATCH)


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "strategy"),
    [*((spec, how) for spec in SPECS for how in ("grouped", "features")), (POINTWISE, "scan"), (SPECS[1], "scan")],
    ids=str,
)
def test_so_do_values_of_any_strategy(spec: ConvSpec, strategy: Any) -> None:
    with run_as(strategy):
        given = tensors(spec, BATCH)
        torch.testing.assert_close(each(spec, given, []), loop(spec, given), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("spec", [POINTWISE, SPECS[1]], ids=str)
def test_kernels_exist_chunk_by_chunk_and_are_not_kept(spec: ConvSpec) -> None:
    given, made, kept = tensors(spec, BATCH), [], {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = each(spec, given, made)
    assert made == [2, 2, 1]
    assert sum(kept.values()) == given[0].numel() + given[1].numel()  # chunks of x and features are views; no kernel
    out.sum().backward()
    assert sorted(made) == [1, 1, 2, 2, 2, 2]


@pytest.mark.usefixtures("small_chunks")
def test_the_convolution_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    plain = execution._run
    monkeypatch.setattr(execution, "_run", lambda *args: (runs.append(0), plain(*args), runs.append(1))[1])
    each(SPECS[1], tensors(SPECS[1], BATCH), []).sum().backward()
    assert (runs.count(0), runs.count(1)) == (6, 3)  # begun again for three chunks, and left where backward has all


@pytest.mark.usefixtures("small_chunks")
def test_gradients_have_gradients() -> None:
    spec = ConvSpec(2, 2, (3,), padding=(1,))
    assert torch.autograd.gradgradcheck(lambda *given: each(spec, list(given), []), tensors(spec, 3))


@pytest.mark.usefixtures("small_chunks")
def test_transforms_of_functions_see_through_it() -> None:
    given = tensors(SPECS[1], BATCH)
    found = torch.func.grad(lambda features: each(SPECS[1], [given[0], features, *given[2:]], []).sum())(given[1])
    (expected,) = torch.autograd.grad(each(SPECS[1], given, []).sum(), given[1])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", [KernelWarehouse(), DyCo3d(hidden=4, placement="all")], ids=str)
def test_a_large_batch_is_trained_in_bounded_memory(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, batch, most = ConvSpec(32, 32, (1, 1)), 256, 64 << 10  # 4 kB per kernel, 1 MB per batch
    monkeypatch.setattr(execution, "_CHUNK_BYTES", most)
    (layer,) = method.build([ConvSite("conv", spec, positions=4)])
    sizes: list[int] = []
    plain = execution._run

    def watched(strategy: Any, x: Tensor, kernels: Tensor, *rest: Any) -> Tensor:
        sizes.append(kernels.nbytes)
        return plain(strategy, x, kernels, *rest)

    monkeypatch.setattr(execution, "_run", watched)
    x = torch.randn(batch, 32, 2, 2)
    layer(x).square().sum().backward()
    chunked = [p.grad.clone() for p in layer.parameters()]
    assert max(sizes) == most
    assert len(sizes) == 2 * 16  # forward and again in backward
    monkeypatch.setattr(execution, "_CHUNK_BYTES", 1 << 30)
    nn.Module.zero_grad(layer)
    layer(x).square().sum().backward()
    assert sizes[-1] == batch * spec.kernel_params * 4
    for chunk, parameter in zip(chunked, layer.parameters(), strict=True):
        assert (chunk - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max().clamp(min=1)
