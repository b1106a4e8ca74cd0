"""The Triton kernel: what it refuses, always; what it computes, in Triton's interpreter; how fast, on a GPU.

Triton is no dependency: CUDA builds of torch bring it. For the interpreter on a CPU:

    pip install --no-deps --target /tmp/triton triton
    PYTHONPATH=/tmp/triton TRITON_INTERPRET=1 .venv/bin/pytest tests/layers/test_fused.py

Without TRITON_INTERPRET it is compiled for GPUs that need not be there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dyncompress.errors import DynCompressError
from dyncompress.layers import ConvSpec, execution, fused
from dyncompress.layers.execution import Strategy, run_as
from dyncompress.layers.fused import fused_conv, unsupported
from dyncompress.layers.recompute import Shapes
from loops import MODES, SPECS, assert_equals_loop, loop, run, tensors

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
COMPILES = os.environ.get("TRITON_INTERPRET") != "1" and find_spec("triton") is not None
interpreted = pytest.mark.skipif(not INTERPRETS, reason="needs Triton and TRITON_INTERPRET=1; see the module docstring")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

SPEC = ConvSpec(6, 4, (3, 3), padding=(1, 1))
# Channels, weights and positions that fill no tile, fill one exactly, or need several.
SHAPES = [
    ConvSpec(1, 1, (1, 1)),
    ConvSpec(16, 16, (1, 1)),
    ConvSpec(19, 37, (1, 1), bias=False),
    ConvSpec(17, 70, (1, 1), (2, 2)),
    ConvSpec(5, 7, (3, 3), padding=(1, 1)),
    ConvSpec(3, 33, (3, 3), (2, 2), (1, 1)),
    ConvSpec(16, 64, (3, 3), padding="same", dilation=(2, 2)),
    ConvSpec(7, 18, (5, 5), padding=(2, 2), bias=False),
    ConvSpec(3, 5, (5, 5), (2, 2), (4, 4)),
    ConvSpec(4, 6, (3, 5), (2, 1), (1, 2), (1, 2)),
    ConvSpec(8, 9, (3,), (2,), (2,)),
    ConvSpec(5, 17, (4,), padding="same"),
    *(ConvSpec(4, 6, (3, 4), (2, 1), (1, 2), padding_mode=mode) for mode in MODES),
]


def shapes(spec: ConvSpec) -> Shapes:
    assert spec.even_pads is not None
    return Shapes(spec.stride, spec.even_pads, spec.dilation, spec.groups, spec.is_pointwise, chunk=8)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Triton is looked for anew, now and by the next test."""
    fused._compiler.cache_clear()
    yield
    fused._compiler.cache_clear()


@pytest.mark.parametrize(
    ("spec", "size", "dtype", "reason"),
    [
        (SPEC, (2, 6, 8, 8), torch.float32, ""),
        (SPEC, (2, 6, 8, 8), torch.bfloat16, ""),
        (SPEC, (2, 6, 8, 8), torch.float64, "x in torch.float64 and the bank in torch.float64"),
        (SPEC, (0, 6, 8, 8), torch.float32, "nothing to compute"),
        (ConvSpec(6, 4, (3, 3)), (2, 6, 2, 8), torch.float32, "nothing to compute"),
        (ConvSpec(6, 4, (3, 3), groups=2), (2, 6, 8, 8), torch.float32, "groups 2, not 1"),
        (ConvSpec(6, 4, (3, 3, 3)), (2, 6, 8, 8, 8), torch.float32, "3 spatial dimensions, not 1 or 2"),
    ],
)
def test_what_it_cannot_compute_is_said(spec: ConvSpec, size: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    x, bank = torch.empty(size, dtype=dtype), torch.empty(spec.out_channels, 2, *spec.weight_shape[1:], dtype=dtype)
    found = unsupported(x, bank, spec)
    assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.groups > 1 or spec.ndim == 3], ids=str)
def test_what_it_cannot_compute_runs_as_if_nothing_were_told(spec: ConvSpec) -> None:
    given = tensors(spec, batch=3)
    with run_as("fused"):
        assert torch.equal(run(spec, None, given), run(spec, execution.choose(*given[:2], spec), given))


def test_a_compiled_graph_runs_as_if_nothing_were_told() -> None:
    given = [t.detach() for t in tensors(SPEC, batch=3)]
    with run_as("fused"):
        compiled = torch.compile(lambda *given: run(SPEC, None, list(given)), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), loop(SPEC, given), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("fresh")
def test_no_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # an import raises ImportError
    with pytest.raises(
        DynCompressError, match=r"no Triton here .* needs version 3\.3 .* install a CUDA build of torch"
    ):
        run(SPEC, "fused", tensors(SPEC, batch=3))


@pytest.mark.usefixtures("fresh")
def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("triton")
    old.__version__, old.__path__ = "3.2.0", []  # type: ignore[attr-defined]
    old.language = ModuleType("triton.language")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    monkeypatch.setitem(sys.modules, "triton.language", old.language)
    with pytest.raises(DynCompressError, match=r"Triton 3\.2\.0 is too old .* install a later torch"):
        run(SPEC, "fused", tensors(SPEC, batch=3))


def test_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_compiler", lambda: (None, False))
    with pytest.raises(DynCompressError, match=r"on the device 'cpu'; .* runs on 'cuda': move network and input"):
        run(SPEC, "fused", tensors(SPEC, batch=3))


@pytest.mark.parametrize("wrong", ["x", "eta", "bias"])
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    x, bank, eta, bias = (t.detach() for t in tensors(SPEC, batch=3))
    given = {"x": x, "bank": bank, "eta": eta, "bias": bias}
    given[wrong] = given[wrong][:, :-1] if wrong != "bias" else bias[:-1]
    with pytest.raises(DynCompressError, match=r"don't belong together: .* eta the shape \[3, 4, 3\] and bias \[4\]"):
        fused_conv(**given, shapes=shapes(SPEC))


@pytest.mark.parametrize(
    ("batch", "outs", "positions", "processors", "expected"),
    [
        (1, 8, 1, 1, (1, 16, 16)),  # no side of less than 16
        (9, 200, 3136, 1, (4, 64, 64)),
        (3, 40, 49, 1, (4, 64, 64)),  # powers of two that hold 3, 40 and 49
        # 64 / 4 images and one tile of 49 positions are 16 programs; 256 channels by 64 make 64, by 32 make 128.
        (64, 256, 49, 64, (4, 64, 64)),
        (64, 256, 49, 65, (4, 32, 64)),
        (64, 256, 49, 132, (4, 16, 64)),
    ],
)
def test_tiles_are_small_where_there_is_little_work(
    batch: int, outs: int, positions: int, processors: int, expected: tuple[int, int, int]
) -> None:
    assert fused._tile(batch, outs, positions, False, processors)[:3] == expected


@interpreted
@pytest.mark.parametrize(("batch", "g"), [(1, 4), (3, 2), (9, 3)])
@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_it_equals_the_loop(spec: ConvSpec, batch: int, g: int) -> None:
    assert_equals_loop(spec, "fused", tensors(spec, batch, g))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [SHAPES[2], SHAPES[4]], ids=str)
def test_in_low_precision_only_weights_and_output_are_rounded(spec: ConvSpec, dtype: torch.dtype) -> None:
    given = [t.detach().to(dtype) for t in tensors(spec, batch=3)]
    result, exact = run(spec, "fused", given), loop(spec, [t.float() for t in given])
    assert result.dtype == dtype
    # At most an eps for the weights and one for the output, since the interpreter cuts bf16 off instead of rounding.
    assert (result.float() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@interpreted
def test_strides_of_any_layout_are_followed() -> None:
    spec = SHAPES[5]
    x, bank, eta, bias = (t.detach() for t in tensors(spec, batch=3))
    expected = loop(spec, [x, bank, eta, bias])
    given = [
        x.contiguous(memory_format=torch.channels_last),
        bank.transpose(0, 1).contiguous().transpose(0, 1),  # as a shipped layer keeps it
        eta.transpose(1, 2).contiguous().transpose(1, 2),
        bias.repeat_interleave(2)[::2],
    ]
    torch.testing.assert_close(run(spec, "fused", given), expected, atol=1e-5, rtol=1e-5)
    given[:2] = torch.stack([x, x], -1)[..., 0], bank.mT.contiguous().mT
    torch.testing.assert_close(run(spec, "fused", given), expected, atol=1e-5, rtol=1e-5)


@interpreted
def test_what_lies_around_a_tensor_is_not_read() -> None:
    spec = SHAPES[4]
    given = [t.detach() for t in tensors(spec, batch=3)]
    framed = []
    for t in given:
        frame = torch.full((t.numel() + 2000,), torch.nan)
        frame[1000:-1000] = t.flatten()
        framed.append(frame[1000:-1000].view(t.shape))
    torch.testing.assert_close(run(spec, "fused", framed), loop(spec, given), atol=1e-5, rtol=1e-5)


@interpreted
def test_under_autocast_dtypes_are_those_of_a_convolution() -> None:
    given = tensors(SPEC, batch=3)
    exact = torch.autograd.grad(loop(SPEC, given).sum(), given)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(SPEC, "fused", given)
    assert out.dtype == torch.bfloat16
    for found, expected in zip(torch.autograd.grad(out.sum(), given), exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@interpreted
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs() -> None:
    x, bank, eta, bias = tensors(SPEC, batch=3)
    expected = torch.autograd.grad(loop(SPEC, [x, bank, eta, bias]).sum(), bank)[0]
    out = run(SPEC, "fused", [x.detach(), bank, eta.detach(), bias.detach()])
    torch.testing.assert_close(torch.autograd.grad(out.sum(), bank)[0], expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not run(SPEC, "fused", [x, bank, eta, bias]).requires_grad


@pytest.mark.skipif(not COMPILES, reason="needs Triton, and no TRITON_INTERPRET; see the module docstring")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(("dtype", "bank"), [("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")])
def test_it_compiles_for_gpus(
    capability: int, few: bool, dtype: str, bank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    kernel, _ = fused._compiler()
    images, down, across, depth, warps = fused._tile(64, 64, 49, dtype == "fp32", 16)
    constants = {
        **dict.fromkeys(("x_column", "eta_kernel", "sh", "sw", "ph", "pw", "dh", "dw"), 1),
        **{"g": 4, "kh": 3, "kw": 3, "images": images, "down": down, "across": across, "depth": depth},
        **{"precision": "tf32", "interpreted": False},
        # Triton makes constants of arguments that are 1.
        **(dict.fromkeys(("batch", "channels", "height", "outs", "rows"), 1) | {"bias": None} if few else {}),
    }
    types = {"x": f"*{dtype}", "bank": f"*{bank}", "eta": "*fp32", "bias": f"*{bank}", "out": f"*{dtype}"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "mma" in compiled.asm["ptx"]  # tensor cores
    assert compiled.metadata.shared <= 48 << 10  # bytes that every GPU has


def on_gpu(spec: ConvSpec, batch: int, dtype: torch.dtype, size: int, g: int = 4) -> list[Tensor]:
    x = torch.randn(batch, spec.in_channels, size, size)
    bank = torch.randn(spec.out_channels, g, *spec.weight_shape[1:]) / spec.weight_shape[1] ** 0.5
    return [
        t.to("cuda", dtype) for t in (x, bank, torch.rand(batch, spec.out_channels, g), torch.randn(spec.out_channels))
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "g"), [(1, 4), (3, 2), (9, 3)])
@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_on_a_gpu_it_equals_the_loop(spec: ConvSpec, batch: int, g: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    given = tensors(spec, batch, g)
    result = run(spec, "fused", [t.detach().cuda() for t in given])
    torch.testing.assert_close(result.cpu(), loop(spec, given).detach(), atol=1e-4, rtol=1e-4)
    low = [t.detach().to("cuda", torch.bfloat16) for t in given]
    exact = loop(spec, [t.float().cpu() for t in low])
    assert (run(spec, "fused", low).float().cpu() - exact).abs().max() <= 0.01 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "size"), [(32, 56), (64, 28), (128, 14), (256, 7)])  # ResNet-18 of half width
def test_on_a_gpu_it_is_timed(channels: int, size: int, dtype: torch.dtype) -> None:
    spec = ConvSpec(channels, channels, (3, 3), padding=(1, 1))
    given = on_gpu(spec, 64, dtype, size)

    def microseconds(strategy: Strategy) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for round_ in range(30):
            if round_ == 10:
                start.record()
            run(spec, strategy, given)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 20 * 1000

    with torch.no_grad():
        torch.testing.assert_close(run(spec, "fused", given), run(spec, "grouped", given), atol=0.1, rtol=0.02)
        times = {strategy: microseconds(strategy) for strategy in ("fused", "grouped", "features")}
    print(f"\n{spec}, {size}x{size}, batch 64, {dtype}, {torch.cuda.get_device_name()}, us: {times}")
