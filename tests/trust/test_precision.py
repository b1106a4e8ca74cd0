"""Precision: a student trains against its teacher in every precision that Lightning offers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests.classifiers import trainer
from tests.trust.witness import Run, check, contrasting, taught

# What Lightning asks for, and how far a first distillation term may be from that of 32-true: a few roundings of the
# precision (8 bits of mantissa, 11, 24).
PARAMETERS = {
    "bf16-mixed": (torch.float32, 0.05),
    "bf16-true": (torch.bfloat16, 0.2),  # the start is fitted to what the layers compute in that precision
    "16-true": (torch.float16, 0.025),  # likewise: three bits more, an eighth of that
    "64-true": (torch.float64, 1e-4),  # the rounding of 32-true, which its start multiplies: up to 2.4e-5, by CPU
}


@cache
def full() -> Run:
    """The same training in 32-true."""
    run = taught(contrasting())
    check(run, steps=4)
    return run


def compared(run: Run) -> float:
    """Relative difference of the first step's distillation term: later steps start from other weights."""
    return abs(run.terms[0] - full().terms[0]) / full().terms[0]


@pytest.mark.parametrize("precision", PARAMETERS)
def test_precision(precision: Any, record_property: Callable[..., None]) -> None:
    """A student trains and is taught, both in that precision; coefficients are computed in 32 bits at least."""
    dtype, limit = PARAMETERS[precision]
    run = taught(contrasting(), options={"precision": precision})
    check(run, steps=4)
    teacher = run.callback._teacher
    assert teacher is not None
    assert {p.dtype for p in run.module.parameters()} == {p.dtype for p in teacher.network.parameters()} == {dtype}
    assert run.coefficients == {torch.promote_types(dtype, torch.float32)}
    assert len(run.logged) == 4
    assert run.logged == pytest.approx(run.terms)
    assert compared(run) < limit
    record_property("figure", f"{precision}: distillation term {compared(run):.1e} from that of 32-true")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_built_in_precision(precision: Any, record_property: Callable[..., None]) -> None:
    """A network that is built in its precision from the start (`trainer.init_module()`) is converted in it."""
    dtype, limit = PARAMETERS[precision]
    with trainer(precision=precision).init_module():
        module = contrasting()
    module.load_state_dict(contrasting().state_dict())  # random numbers of 16 or 64 bits are others
    assert module.net.conv1.weight.dtype == dtype
    run = taught(module, options={"precision": precision})
    check(run, steps=4)
    assert {p.dtype for p in run.module.parameters()} == {dtype}
    assert compared(run) < limit
    record_property("figure", f"{precision}: distillation term {compared(run):.1e} from that of 32-true")


def scaled(scaler: Any, device: str) -> Run:
    """Train in 16-mixed with a scaler whose first scale overflows."""
    plugin = MixedPrecision("16-mixed", device, scaler)
    return taught(contrasting(), batches=8, options={"plugins": [plugin], "accelerator": device})


def check_scaled(run: Run, scaler: Any, first: float) -> str:
    check(run, steps=8)
    assert len(run.terms) == 8
    halvings = math.log2(first / scaler.get_scale())
    assert halvings == int(halvings) and 0 < halvings < 8  # some steps were skipped, not all
    assert {p.dtype for p in run.module.parameters()} == {torch.float32}
    assert run.coefficients == {torch.float32}
    assert compared(run) < 0.05  # the start is fitted to outputs of 16 bits
    return f"{int(halvings)} of 8 steps overflowed and were skipped; term {compared(run):.1e} from that of 32-true"


FIRST = 2.0**17


def test_scaler(record_property: Callable[..., None]) -> None:
    """16-bit mixed training with a gradient scaler: steps that overflow are skipped, the others are taught (CPU)."""
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST)
    record_property("figure", check_scaled(scaled(scaler, "cpu"), scaler, FIRST))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scaler_on_gpu(record_property: Callable[..., None]) -> None:
    """16-bit mixed training with a gradient scaler: steps that overflow are skipped, the others are taught (GPU)."""
    scaler = torch.amp.GradScaler("cuda", init_scale=FIRST)
    record_property("figure", check_scaled(scaled(scaler, "cuda"), scaler, FIRST))
