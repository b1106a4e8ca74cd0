"""The speed benchmark runs what it says that it runs: in every mode, in a taught step, beside the peers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.speed import __main__ as command_line
from benchmarks.speed import modes
from benchmarks.speed.distillation import arms
from benchmarks.speed.peers import builders
from benchmarks.speed.request import Request
from benchmarks.speed.section import SECTIONS
from benchmarks.speed.training import SGD
from dyncompress.distillation import DistillConfig, Teacher, output_loss


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("mode", "dtype", "off"),
    [
        ("fp32", torch.float32, 0.0),
        ("tf32", torch.float32, 0.0),  # asks nothing of a CPU
        ("channels_last", torch.float32, 1e-6),
        ("compiled", torch.float32, 0.0),
        ("bf16", torch.bfloat16, 0.02),
        ("bf16+channels_last+compiled", torch.bfloat16, 0.02),
    ],
)
def test_every_mode_computes_what_the_network_computes(
    net: nn.Module, mode: str, dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: compile_(net, backend="eager", **options))
    with modes.conditions(mode):
        call = modes.inference(net, X, mode)
        with torch.inference_mode():
            output = call()
            expected = net.eval()(X)
    assert output.dtype == dtype
    assert (output - expected).abs().max() <= off * expected.abs().max()
    assert next(net.parameters()).dtype == torch.float32 and next(net.parameters()).requires_grad


@pytest.mark.parametrize("mode", ["fp32", "channels_last", "bf16"])
def test_a_training_step_moves_a_copy_against_the_gradient(net: nn.Module, mode: str) -> None:
    y = torch.arange(5) % 4
    weights = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        weights.extend(parameters)
        return SGD(weights, lr=0.5, momentum=0.0)

    modes.training(net, X, mode, lambda out: F.cross_entropy(out.float(), y).backward(), optimizer)()
    expected = torch.autograd.grad(F.cross_entropy(net.train()(X), y), list(net.parameters()))
    for before, after, gradient in zip(net.parameters(), weights, expected, strict=True):
        moved = (before - after).detach() / 0.5
        assert (moved - gradient).norm() <= (0.05 if mode == "bf16" else 1e-5) * gradient.norm()


def test_a_layer_passes_a_gradient_on(net: nn.Module) -> None:
    x = X.clone().requires_grad_()
    modes.training(net, x, "fp32", lambda out: out.sum().backward())()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_conditions_are_those_of_the_mode_and_then_what_they_were() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for mode, allowed in (("fp32", False), ("tf32+compiled", True)):
        with modes.conditions(mode):
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_what_a_mode_cannot_do_is_named(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mode 'bf16\\+int8' is unknown"):
        modes.words("bf16+int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA graph takes a CUDA device"):
        modes.inference(net, X, "graphed")
    assert all(modes.words(mode) for found in modes.DEFAULT.values() for mode in found)


# ---- what takes part ---------------------------------------------------------------------------------------------


def test_the_distilled_step_is_the_plain_one_and_the_term() -> None:
    torch.manual_seed(0)
    student, original = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
    x, y = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    calls = arms(student, original, x, y)
    assert list(calls) == ["plain", "distilled", "teacher"]
    answer, _ = calls["teacher"]()  # type: ignore[misc]
    assert torch.equal(answer, original(x))
    term = output_loss(student(x), Teacher(original).answer((x,), {})[0], DistillConfig())
    (expected,) = torch.autograd.grad(term, [student[1].weight])
    moved = {name: -_weight_after(calls[name]) / SGD.keywords["lr"] for name in ("plain", "distilled")}
    assert torch.allclose(moved["distilled"] - moved["plain"], expected, atol=1e-4)


def _weight_after(learn: Any) -> torch.Tensor:
    """The weight after one step; a Learner's net is its own copy."""
    learn()
    return learn.__self__.net[1].weight.detach().clone()


def test_ours_depends_on_its_input_and_the_static_layer_is_itself() -> None:
    found = builders(SimpleNamespace(odconv=None, kernelwarehouse=None))  # type: ignore[arg-type]
    assert list(found) == ["static", "dynet", "CondConv"]
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    assert found["static"](conv, 64) is conv
    layer = found["dynet"](conv, 64)
    x = torch.randn(2, 4, 8, 8)
    eta = layer.coefficients(x)
    assert layer(x).shape == conv(x).shape and eta.shape == (2, 6, 4)
    assert (eta[0] - eta[1]).abs().max() > 1e-4
    assert layer.bank.shape == (6, 4, 4, 3, 3)


def test_the_command_line_takes_lists_either_way() -> None:
    parse = command_line._parser().parse_args
    assert parse(["--only", "networks,layers", "planning"]).only == [["networks", "layers"], ["planning"]]
    assert parse([]).only == [list(SECTIONS)]
    assert parse(["--only"]).only == []
    for wrong in (["--only", "netwerks"], ["--modes", "fp64"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_a_gpu_has_modes_that_a_cpu_has_not() -> None:
    assert Request().ways == ("fp32",)
    assert {word for mode in Request(device="cuda").ways for word in mode.split("+")} == set(modes.WORDS)
    assert Request(modes=("tf32",)).ways == ("tf32",)
