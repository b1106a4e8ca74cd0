"""What a compressed network must pass. Each check returns "" or what is wrong."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from benchmarks.networks import call
from dyncompress.conversion import convert
from dyncompress.plan import Plan

TOLERANCE = 1e-4
SEEDS = range(3)  # layers may be dropped at random


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, however it is nested."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def run(net: nn.Module, example: Any) -> Any:
    """The network's output in eval mode."""
    with torch.no_grad():
        return call(net.eval(), example)


def distance(found: Any, expected: Any) -> float:
    """Largest difference of two outputs, relative to the largest value of the second, over its floating tensors."""
    worst = 0.0
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        if b.is_floating_point() and b.numel():
            worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item())
            if not a.isfinite().all():
                return float("inf")
    return worst


def same_form(student: nn.Module, original: nn.Module, example: Any) -> str:
    """Same nesting of the output, same shapes and types of its tensors."""
    (a, form), (b, wanted) = tree_flatten(run(student, example)), tree_flatten(run(original, example))
    if form != wanted:
        return f"the output's structure is {form}, not {wanted}"[:300]
    for x, y in zip(a, b, strict=True):
        if isinstance(y, Tensor) and (x.shape != y.shape or x.dtype != y.dtype):
            return f"an output is {tuple(x.shape)} {x.dtype}, not {tuple(y.shape)} {y.dtype}"
    return ""


def learns(student: nn.Module, original: nn.Module, example: Any) -> str:
    """A backward pass in training mode gives a gradient to every parameter that had one in the original."""
    try:
        had = _with_gradient(original, example, 0)
    except RuntimeError as error:
        return f"n/a: the original doesn't train either ({_first_line(error)})"
    has = set().union(*(_with_gradient(student, example, seed) for seed in SEEDS))
    trained = {name.rpartition(".")[0] for name in had}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and name not in has:
            known = name in dict(original.named_parameters())
            if name in had if known else any(_within(name, module) for module in trained):
                return f"no gradient for {name}"
    return ""


def _within(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _with_gradient(net: nn.Module, example: Any, seed: int) -> set[str]:
    net = deepcopy(net).train()
    torch.manual_seed(seed)
    loss = sum(t.square().sum() for t in tensors(call(net, example)) if t.is_floating_point() and t.requires_grad)
    if not isinstance(loss, Tensor):
        raise RuntimeError("its output hangs on no parameter")
    loss.backward()  # type: ignore[union-attr]
    return {name for name, parameter in net.named_parameters() if parameter.grad is not None}


def round_trip(student: nn.Module, plan: Plan, original: nn.Module, example: Any) -> str:
    """The state dict restores the student in a network of other weights, converted with the same plan."""
    file = io.BytesIO()
    torch.save(student.state_dict(), file)
    file.seek(0)
    other = deepcopy(original)
    with torch.no_grad():
        for value in other.state_dict().values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.add_(1)
    restored = convert(other, plan)
    restored.load_state_dict(torch.load(file, weights_only=True))
    off = distance(run(restored, example), run(student, example))
    return "" if off < 1e-6 else f"the restored student is off by {off:.1e}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
