"""Every way to run a per-sample convolution gives what a loop over the samples gives."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dyncompress.layers import ConvSpec, execution
from dyncompress.layers.execution import Strategy, choose, run_as
from dyncompress.layers.mixing import assemble
from loops import POINTWISE, SPECS, assert_equals_loop, loop, run, tensors

# torch's own modules say so of "same" padding and even kernels; ours pad before they convolve.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("strategy", ["grouped", "features", None])
def test_a_batch_equals_the_loop(spec: ConvSpec, strategy: Strategy | None) -> None:
    assert_equals_loop(spec, strategy, tensors(spec, batch=3))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_sample_equals_the_loop(spec: ConvSpec) -> None:
    given = tensors(spec, batch=1)
    assert choose(given[0], given[1], spec) == "single"
    assert_equals_loop(spec, None, given)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_kernel_for_several_samples_is_refused(spec: ConvSpec) -> None:
    with pytest.raises(RuntimeError, match="dimension"):
        run(spec, "single", tensors(spec, batch=2))


@pytest.mark.parametrize("bias", [True, False])
def test_a_matrix_product_equals_the_loop(bias: bool) -> None:
    for spec in (ConvSpec(6, 4, (1, 1), bias=bias), ConvSpec(6, 4, (1,), bias=bias)):
        given = tensors(spec, batch=3)
        assert choose(given[0], given[1], spec) == "bmm"
        assert_equals_loop(spec, "bmm", given)


@pytest.mark.parametrize("spec", [POINTWISE, SPECS[1], SPECS[2]], ids=str)
def test_a_scan_equals_the_loop(spec: ConvSpec) -> None:
    pytest.importorskip("torch._higher_order_ops.scan")
    given = tensors(spec, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(run(spec, "scan", given), loop(spec, given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", [SPECS[1], POINTWISE], ids=str)
def test_chunks_equal_the_loop(spec: ConvSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels of 6 * 4 * 9 * 4 = 864 (or 96) bytes an image: 4000 bytes hold 4 (or 41), and 43 leave a rest.
    monkeypatch.setattr(execution, "_CHUNK_BYTES", 4000)
    given = tensors(spec, batch=43)
    assert_equals_loop(spec, None, given)
    with torch.no_grad():
        torch.testing.assert_close(run(spec, None, given), loop(spec, given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_sample_gives_no_output_and_zero_gradients(spec: ConvSpec) -> None:
    given = tensors(spec, batch=0)
    result = run(spec, None, given)
    assert result.shape == (0, spec.out_channels, *spec.output_size(given[0].shape[2:]))
    gradients = torch.autograd.grad(result.sum(), given)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("channels", "size", "g", "batch", "expected"),
    [
        (256, 7, 2, 16, "features"),  # 256 * 256 * 9 * 4 bytes > 512 KiB
        (256, 7, 4, 16, "grouped"),  # twice as many static convolutions
        (256, 7, 2, 15, "grouped"),  # too few images
        (256, 10, 2, 16, "features"),
        (256, 11, 2, 16, "grouped"),  # 121 positions
        (120, 8, 2, 16, "grouped"),  # 120 * 120 * 9 * 4 bytes < 512 KiB
    ],
)
def test_large_kernels_on_small_maps_mix_features(
    channels: int, size: int, g: int, batch: int, expected: Strategy
) -> None:
    spec = ConvSpec(channels, channels, (3, 3), padding=(1, 1))
    x = torch.empty(batch, channels, size, size, device="meta")
    bank = torch.empty(channels, g, channels, 3, 3, device="meta")
    assert choose(x, bank, spec) == expected


def test_one_strategy_can_be_forced() -> None:
    given = tensors(SPECS[1], batch=3, g=2)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            run(SPECS[1], None, given)
        return counter.get_total_flops()

    # 3 images * 7 * 8 positions * 6 * 4 * 9 weights; g times that when all kernels run and none is assembled.
    conv = 3 * 7 * 8 * 6 * 4 * 9
    assert flops() // 2 == conv + 3 * 2 * 6 * 4 * 9
    with run_as("features"):
        assert flops() // 2 == 2 * conv
        with run_as("grouped"):
            assert flops() // 2 == conv + 3 * 2 * 6 * 4 * 9
        assert flops() // 2 == 2 * conv
    assert flops() // 2 == conv + 3 * 2 * 6 * 4 * 9


def test_kernels_are_the_weighted_sum() -> None:
    # Two output channels with two 1x1 kernels each, two samples.
    bank = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).reshape(2, 2, 1, 1, 1)
    eta = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert assemble(bank, eta).flatten(1).tolist() == [[21.0, 4300.0], [10.0, 100.0]]


def test_kernels_are_mixed_in_the_dtype_of_the_bank() -> None:
    bank, eta = torch.randn(4, 3, 2, 3, 3), torch.rand(5, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = assemble(bank, eta)
    assert torch.equal(mixed, assemble(bank, eta))
    assert assemble(bank.bfloat16(), eta).dtype == torch.bfloat16
    assert assemble(bank.double(), eta).dtype == torch.float64


@pytest.mark.parametrize("strategy", ["grouped", "features", "bmm"])
def test_autocast_gives_what_a_convolution_gives(strategy: Strategy) -> None:
    given = tensors(POINTWISE, batch=3)
    with torch.autocast("cpu", torch.bfloat16):
        result = run(POINTWISE, strategy, given)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), loop(POINTWISE, given), atol=0.05, rtol=0.02)
