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

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.graph import as_call
from dyncompress.layers import ConvSpec
from dyncompress.narrowing import positions
from dyncompress.plan import Plan
from dyncompress.ridge import STRENGTH, Problem, check_strength

ROWS = 1 << 13
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

    def __post_init__(self) -> None:
        if not isinstance(self.fit, str) or self.fit not in ("ridge", "plain"):
            raise DynCompressError(f"warm start {shown(self.fit)} is unknown: choose 'ridge' or 'plain'")
        if not isinstance(self.bank, str) or self.bank not in ("filters", "copies"):
            raise DynCompressError(f"bank {shown(self.bank)} is unknown: choose 'filters' or 'copies'")
        if type(self.rows) is not int or self.rows < 1:
            raise DynCompressError(f"rows {shown(self.rows)} is no number of samples: {ROWS} is usual")
        check_strength(self.strength)

    @classmethod
    def of(cls, given: str | WarmStart) -> WarmStart:
        """A warm start by the name of its ``fit``, or as it is."""
        return given if isinstance(given, WarmStart) else cls(fit=given)  # type: ignore[arg-type]


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


class _EnoughError(BaseException):
    """The layer has run. A BaseException, so that the network's ``except Exception`` does not hold it up."""


@dataclass
class _Sample:
    """What one call of a layer computed in the original: places [B, P] of its output, and values [B, P, out]."""

    places: Tensor
    values: Tensor


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

    Returns:
        One `Fit` per layer, in the order in which they run.

    Raises:
        DynCompressError: If an argument is out of its range, or outputs are NaN or infinite.
    """
    check_strength(strength)
    found = list(batches)
    if not found:
        raise DynCompressError("compensate has no batch; give a list of a few inputs of the network")
    layers, skipped = _candidates(net, original)
    with evaluating(original), evaluating(net):
        samples = _sampled(original, plan, list(layers), found, rows, seed)
        fits = []
        for name, calls in samples.items():
            layer: Any = layers[name]
            norm = _norm_after(net, plan, name)
            centred = layer.bias is not None or norm is not None
            problem = Problem(layer.weight, layer.bias, getattr(layer, "groups", 1), centred)
            reason = _collect(net, layer, found, calls, problem)
            calls.clear()
            if reason:
                skipped[name] = reason
                continue
            try:
                solution = problem.solve(strength)
            except DynCompressError:
                raise DynCompressError(
                    f"on these batches what '{name}' reads, or computes in the original, is not finite; the numbers in"
                    " the data and in the weights must be: look for NaN and infinity in both"
                ) from None
            layer.weight.copy_(solution.weight)
            if layer.bias is not None:
                layer.bias += solution.shift.to(layer.bias)
            elif norm is not None:
                norm.running_mean -= solution.shift.to(norm.running_mean)
            fits.append(Fit(name, solution.before, solution.after))
    skipped |= {name: "it was not called on these batches" for name in layers if name not in samples}
    return (*fits, *(Fit(name, reason=reason) for name, reason in skipped.items()))


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


def _candidates(net: nn.Module, original: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
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


# ---- samples -----------------------------------------------------------------------------------------------------


def _sampled(
    original: nn.Module, plan: Plan, names: Sequence[str], batches: Sequence[Any], rows: int, seed: int
) -> dict[str, list[list[_Sample]]]:
    """Per layer, in the order in which they run, and per batch: a sample of every call."""
    kept = [k for k in plan.keep if not isinstance(k, int)]
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[list[_Sample]]] = {}
    at_batch = 0

    def watch(name: str) -> Any:
        runs = plan.graph.axes.get(f"{name}.weight:0")
        stay = None if runs is None else torch.tensor(positions(runs, kept))

        def look(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            maps = _places_last(module, out)
            images, places, _ = maps.shape
            share = max(1, rows // max(1, images * len(batches)))
            if share < places:
                at = torch.randint(places, (images, share), generator=generator).to(out.device)
            else:
                at = torch.arange(places, device=out.device).expand(images, places)
            values = maps.take_along_dim(at.unsqueeze(2), 1)
            values = values if stay is None else values[..., stay.to(out.device)]
            samples.setdefault(name, [[] for _ in batches])[at_batch].append(_Sample(at, values))

        return look

    handles = [original.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        for at_batch, inputs in enumerate(batches):  # noqa: B007 - the hooks read it
            args, kwargs = as_call(inputs)
            original(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return samples


def _places_last(module: nn.Module, t: Tensor) -> Tensor:
    """Input or output of a layer as [images, places, channels]."""
    if isinstance(module, nn.Linear):
        return t.reshape(t.shape[0], -1, t.shape[-1]) if t.dim() > 1 else t.reshape(1, 1, -1)
    t = t if t.dim() == len(module.kernel_size) + 2 else t.unsqueeze(0)  # type: ignore[arg-type]
    return t.flatten(2).transpose(1, 2)


def _patches(module: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """What a layer reads at places [B, P] of its output: [groups, B * P, in / groups * taps], as its weight has it."""
    if isinstance(module, nn.Linear):
        read = _places_last(module, x).take_along_dim(places.unsqueeze(2), 1)
        return read.flatten(0, 1).unsqueeze(0)
    spec = ConvSpec.of(module)  # type: ignore[arg-type]
    x = x if x.dim() == spec.ndim + 2 else x.unsqueeze(0)
    sizes = spec.output_size(x.shape[2:])
    pads = [side for pair in reversed(spec.pads) for side in pair]
    x = F.pad(x, pads, mode="constant" if spec.padding_mode == "zeros" else spec.padding_mode).movedim(1, -1)
    image = torch.arange(len(x), device=x.device).unsqueeze(1)
    corner = [at * step for at, step in zip(torch.unravel_index(places, sizes), spec.stride, strict=True)]
    taps = [
        x[(image, *(c + o * d for c, o, d in zip(corner, offset, spec.dilation, strict=True)))]
        for offset in itertools.product(*map(range, spec.kernel_size))
    ]
    gathered: Tensor = torch.stack(taps, -1).flatten(0, 1)  # [B * P, in, taps]
    patches: Tensor = gathered.unflatten(1, (spec.groups, -1)).transpose(0, 1).flatten(2)
    return patches


def _collect(
    net: nn.Module, layer: nn.Module, batches: Sequence[Any], calls: Sequence[Sequence[_Sample]], problem: Problem
) -> str:
    """Run the network up to a layer on every batch and add up what the layer reads; a reason where that can't be."""
    waiting: list[_Sample] = []
    odd = ""

    def look(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        nonlocal odd
        sample, x = waiting.pop(0), args[0]
        if _places_last(module, out).shape[::2] != (len(sample.places), sample.values.shape[2]):
            odd = "what it computes has another shape than in the original"
        elif not odd:
            problem.add(_patches(module, x, sample.places), sample.values.flatten(0, 1))
        if not waiting:
            raise _EnoughError

    handle = layer.register_forward_hook(look)
    try:
        for inputs, samples in zip(batches, calls, strict=True):
            waiting = list(samples)
            if not waiting:
                continue
            args, kwargs = as_call(inputs)
            try:
                net(*args, **kwargs)
            except _EnoughError:
                continue
            return "it runs less often than in the original"
    finally:
        handle.remove()
    return odd
