"""Least squares make up for a cut: each layer's remaining weights are fitted to what the layer computed before.

Layer by layer, in the order in which they run, with ``y`` what the original computes there (its kept output channels)
and ``h`` the patch of the narrowed network's own input, already compensated upstream::

    W*, b* = argmin  sum over samples |y - W h - b|^2  +  lam |W - W0|^2        (`dyncompress.ridge`)

where W0, b0 are what the cut left. The constant b is free where the layer has a bias, or a BatchNorm reads it alone,
whose mean then takes it up. The error of a layer on these samples is at most that of the cut, for every strength: W0
is feasible, and costs nothing in the second term.

BatchNorms keep the original's statistics meanwhile: they are right for outputs that are nearly the original's.

Source: He, Zhang, Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv 1707.06168,
section 3.1 (reconstruction with samples per image). Differs: a ridge towards the cut's weights; every layer that
follows a cut is fitted, depthwise and linear ones included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.narrowing import positions
from dyncompress.plan import Plan
from dyncompress.ridge import STRENGTH, Problem, check_strength
from dyncompress.samples import ROWS, Sample, collect, patches_of, sampled

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class WarmStart:
    """What a student is before it is trained.

    Attributes:
        fit: ``"ridge"``: every layer is fitted to the original (`compensate`). ``"plain"``: weights are those of the
            kept channels.
        strength: How much fitted weights are held to those that the cut left, from 0 on.
        rows: Samples per layer.
        bank: Where further kernels of a dynamic layer come from: ``"filters"`` that the cut discarded, or ``"copies"``
            of the static kernel, with noise that cancels out.
        dynamics: ``"zero"``: a dynamic layer starts as the fitted static one, whatever its input. ``"fitted"``: how it
            depends on its input is fitted to the original, too (`reconstruct`); takes ``fit="ridge"``.

    Raises:
        DynCompressError: If an attribute is out of its range.

    Example:
        >>> WarmStart.of("ridge").strength
        0.1
    """

    fit: Literal["ridge", "plain"] = "ridge"
    strength: float = STRENGTH
    rows: int = ROWS
    bank: Literal["filters", "copies"] = "filters"
    dynamics: Literal["zero", "fitted"] = "zero"

    def __post_init__(self) -> None:
        if not isinstance(self.fit, str) or self.fit not in ("ridge", "plain"):
            raise DynCompressError(f"warm start {shown(self.fit)} is unknown: choose 'ridge' or 'plain'")
        if not isinstance(self.bank, str) or self.bank not in ("filters", "copies"):
            raise DynCompressError(f"bank {shown(self.bank)} is unknown: choose 'filters' or 'copies'")
        if not isinstance(self.dynamics, str) or self.dynamics not in ("zero", "fitted"):
            raise DynCompressError(f"dynamics {shown(self.dynamics)} is unknown: choose 'zero' or 'fitted'")
        if self.dynamics == "fitted" and self.fit != "ridge":
            raise DynCompressError(
                f"dynamics 'fitted' goes on where a static fit ends, and fit is {shown(self.fit)}: choose fit 'ridge',"
                " or dynamics 'zero'"
            )
        if type(self.rows) is not int or self.rows < 1:
            raise DynCompressError(f"rows {shown(self.rows)} is no number of samples: {ROWS} is usual")
        check_strength(self.strength)

    @classmethod
    def of(cls, given: str | WarmStart) -> WarmStart:
        """A warm start by the name of its ``fit``, or as it is."""
        return given if isinstance(given, WarmStart) else cls(fit=given)  # type: ignore[arg-type]

    def within(self, batches: int, warmup: float = 0.0) -> WarmStart:
        """The same, where it is given so many batches, and a training has such a warm-up.

        Raises:
            DynCompressError: If fitted dynamics get no batches, or are held back by the warm-up.
        """
        if self.dynamics == "fitted" and not batches:
            raise DynCompressError(
                "dynamics 'fitted' has no batch to be fitted on: give convert a list of a few inputs as calibrate, or"
                " a training recalibrate=8; or choose dynamics 'zero'"
            )
        if self.dynamics == "fitted" and warmup:
            raise DynCompressError(
                f"warmup {shown(warmup)} starts layers static, and dynamics 'fitted' starts them dynamic: choose"
                " warmup 0 or dynamics 'zero'"
            )
        return self


@dataclass(frozen=True)
class Fit:
    """How well a layer of the narrowed network does what it did.

    Attributes:
        module: Its name.
        before: Mean squared error of its outputs over their variance in the original, as the cut left the layer,
            on the inputs that it has now.
        after: The same with the fitted weights.
        reason: Why it was left as the cut left it; "" where it was fitted.
    """

    module: str
    before: float = 0.0
    after: float = 0.0
    reason: str = ""


@torch.no_grad()
def compensate(
    net: nn.Module,
    original: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    strength: float = STRENGTH,
    rows: int = ROWS,
    seed: int = 0,
    hold_out: bool = False,
) -> tuple[Fit, ...]:
    """Fit every convolution and linear layer of a narrowed network to the original, in place.

    The original runs once over the batches, the narrowed network once per layer, up to that layer. In memory are
    ``rows`` outputs of every layer, and one matrix of (inputs of the layer)^2 in fp64.

    Args:
        net: The narrowed network, still static.
        original: The network that it was cut from; left as it is.
        plan: The plan, with its kept channels named.
        batches: Inputs, each as `trace` takes them, on the networks' device.
        strength: How much the fitted weights are held to the cut's ones, from 0 on; 0 gives, of the best, the nearest.
        rows: Samples per layer: places of its output, spread over all images.
        seed: Of which places are sampled.
        hold_out: Leave out every fifth image, for `reconstruct` to judge by.

    Returns:
        One `Fit` per layer, in the order in which they run.

    Raises:
        DynCompressError: If an argument is out of its range, or outputs are NaN or infinite.
    """
    check_strength(strength)
    found = list(batches)
    if not found:
        raise DynCompressError("compensate has no batch; give a list of a few inputs of the network")
    layers, skipped = candidates(net, original)
    with evaluating(original), evaluating(net):
        samples = sampled(original, plan, list(layers), found, rows, seed)
        fits = []
        for name, calls in samples.items():
            fits.append(solved(net, original, plan, name, found, calls, strength, hold_out))
            calls.clear()
    skipped |= {name: "it was not called on these batches" for name in layers if name not in samples}
    skipped |= {f.module: f.reason for f in fits if f.reason}
    return (*(f for f in fits if not f.reason), *(Fit(name, reason=reason) for name, reason in skipped.items()))


def solved(
    net: nn.Module,
    original: nn.Module,
    plan: Plan,
    name: str,
    batches: Sequence[Any],
    calls: Sequence[Sequence[Sample]],
    strength: float,
    hold_out: bool,
) -> Fit:
    """Fit one plain layer, in place, to a sample of what the original computes there, on what it reads now."""
    layer: Any = net.get_submodule(name)
    constant = Constant(net, original, plan, name, layer)
    problem = Problem(layer.weight, constant.value, getattr(layer, "groups", 1), constant.free)

    def add(x: Tensor, sample: Sample) -> None:
        if hold_out:
            x, sample = x[~sample.held_out], sample.at(~sample.held_out)
        problem.add(patches_of(layer, x, sample.places), sample.values.flatten(0, 1))

    if reason := collect(net, layer, batches, calls, add):
        return Fit(name, reason=reason)
    try:
        solution = problem.solve(strength)
    except DynCompressError:
        raise not_finite(name) from None
    layer.weight.copy_(solution.weight)
    constant.add(solution.shift)
    return Fit(name, solution.before, solution.after)


class Constant:
    """What is added to every output of a layer: its bias, or what the BatchNorm that alone reads it took up.

    A BatchNorm took up what is missing in its mean, to that of the original's.

    Attributes:
        free: Whether there is one.
        value: [out], or None.
    """

    def __init__(self, net: nn.Module, original: nn.Module, plan: Plan, name: str, layer: Any) -> None:
        self.bias, norm = getattr(layer, "bias", None), _norm_after(net, plan, name)
        self.mean = None if norm is None or self.bias is not None else norm.running_mean
        self.free = self.bias is not None or self.mean is not None
        self.value: Tensor | None = None if self.bias is None else self.bias.detach()
        if self.mean is not None:
            was, runs = _norm_after(original, plan, name).running_mean, plan.graph.axes.get(f"{name}.weight:0")
            kept = [k for k in plan.keep if not isinstance(k, int)]
            self.value = (was if runs is None else was[positions(runs, kept)]) - self.mean

    def add(self, shift: Tensor) -> None:
        """Add so much [out] more."""
        if self.bias is not None:
            self.bias += shift.to(self.bias)
        elif self.mean is not None:
            self.mean -= shift.to(self.mean)


def not_finite(name: str) -> DynCompressError:
    """What is raised where a layer can't be fitted to numbers."""
    return DynCompressError(
        f"on these batches what '{name}' reads, or computes in the original, is not finite; the numbers in"
        " the data and in the weights must be: look for NaN and infinity in both"
    )


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in eval mode and without a compiler; modes are put back."""
    modes = {m: m.training for m in net.modules()}
    compiled = {m: vars(m)["_compiled_call_impl"] for m in modes if vars(m).get("_compiled_call_impl")}
    try:
        for m in compiled:
            m._compiled_call_impl = None  # compiling for this takes longer than a few batches without
        net.eval()
        yield
    finally:
        for m, call in compiled.items():
            m._compiled_call_impl = call
        for m, training in modes.items():
            m.training = training


# ---- which layers ------------------------------------------------------------------------------------------------


def candidates(net: nn.Module, original: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers that can be fitted, and why others with a kernel can't."""
    holders = Counter(id(p) for m in original.modules() for p in m._parameters.values() if p is not None)
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            skipped[name] = "it is a transposed convolution"
        elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            own = original.get_submodule(name)
            if type(module) not in _KINDS or "weight" not in module._parameters or own._forward_pre_hooks:
                skipped[name] = f"its weight is computed, or it is no plain layer ({type(module).__name__})"
            elif holders[id(own.weight)] > 1:
                skipped[name] = "it shares its weight with another layer"
            else:
                layers[name] = module
    return layers, skipped


def _norm_after(net: nn.Module, plan: Plan, name: str) -> Any:
    """The BatchNorm that alone reads a layer, where it normalises with statistics of its own."""
    path = next((op.norm for op in plan.graph.operations if op.module == name), "")
    norm = net.get_submodule(path) if path else None
    counts = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    return norm if counts else None
