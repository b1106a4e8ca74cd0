"""Dynamics that are fitted: a layer's router and bank learn, from a few batches, what the original computed there.

A dynamic layer starts as the static one that `compensate` fitted, whatever its input. Layer by layer, in the order in
which they run, with ``y`` what the original computes there (its kept output channels), ``x`` the student's own input,
already fitted upstream, and theta the layer's parameters::

    theta*, b* = argmin  sum over samples |y - f(x; theta) - b|^2 / |y - mean y|^2  +  decay |theta - theta0|^2

by Adam, in a fixed number of steps on mini-batches, from theta0, that start. The constant b is free where `compensate`
has one. Every fifth image is held out: of the start and of what the steps passed through, the layer keeps what is best
on those, so that there no layer is worse than it starts. Plain layers behind a dynamic one are solved again, by ridge.

A layer is fitted at the end of its schedules (temperatures at 1), and stays there. What several layers read (the cells
of a warehouse) stays as it is: it would change layers that were fitted before.

Source: Li et al., BRECQ, ICLR 2021, arXiv 2102.05426, section 3.2 (reconstruction by gradient descent, layer-wise).
Differs: of dynamics instead of rounding; with a decay towards the start, and held-out images that decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dyncompress.compensation import Constant, Fit, candidates, evaluating, not_finite, solved
from dyncompress.layers import DynamicConv, TokenConv
from dyncompress.plan import Plan
from dyncompress.ridge import STRENGTH
from dyncompress.samples import EACH, ROWS, Sample, collect, places_last, sampled

STEPS, RATE, DECAY = 200, 2e-2, 0.0
_SLOWER = 0.1  # what is no router, by its rate
_COMPONENTS = 8  # of what a router reads
_IMAGES = 32  # of a mini-batch
_LOOKS = 10  # at the held-out images


class _How(NamedTuple):
    steps: int
    rate: float
    decay: float


@dataclass
class _Part:
    """Images of one call of a layer: what it reads, the features of its block's router, what it should compute."""

    x: Tensor
    features: Tensor | None
    sample: Sample

    def at(self, images: Tensor) -> _Part:
        """Some of them."""
        features = None if self.features is None else self.features[images]
        return _Part(self.x[images], features, self.sample.at(images))


@torch.no_grad()
def reconstruct(
    net: nn.Module,
    original: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    strength: float = STRENGTH,
    rows: int = ROWS,
    seed: int = 0,
    steps: int = STEPS,
    rate: float = RATE,
    decay: float = DECAY,
) -> tuple[Fit, ...]:
    """Fit every dynamic layer of a student to the original, in place, and the plain layers behind it once more.

    The original runs once over the batches, the student once per layer, up to that layer. In memory are ``rows``
    outputs of every layer, and of one layer all that it reads.

    Args:
        net: The student, which computes what the narrowed static network does, after `compensate` and before
            `settle_norms`: what BatchNorms took up is told from the original's means.
        original: The network that it was made from; left as it is.
        plan: The plan, with its kept channels named.
        batches: Inputs, each as `trace` takes them, on the networks' device.
        strength: Of the ridge of plain layers.
        rows: Samples per layer: places of its output, spread over all images.
        seed: Of which places are sampled, and of the order of mini-batches.
        steps: Of Adam, per layer.
        rate: Its learning rate, which falls to 0 as a cosine.
        decay: How much parameters are held to the start.

    Returns:
        One `Fit` per layer from the first dynamic one on, in the order in which they run; of dynamic layers on the
        images that were held out. Nothing for a network without dynamic layers.

    Raises:
        DynCompressError: If outputs are NaN or infinite.
    """
    found, dynamic, how = list(batches), _dynamic(net, plan), _How(steps, rate, decay)
    if not dynamic:
        return ()
    names = [*dict.fromkeys((*candidates(original, original)[0], *dynamic))]
    fits: list[Fit] = []
    with evaluating(original), evaluating(net):
        samples = sampled(original, plan, names, found, rows, seed)
        for name, calls in samples.items():
            if name in dynamic:
                layer, parts = dynamic[name], list[_Part]()
                reason = _recorded(net, layer, found, calls, parts)
                constant = Constant(net, original, plan, name, layer)
                fits.append(
                    Fit(name, reason=reason) if reason else _Fitting(layer, parts, constant, seed).run(name, how)
                )
            elif fits:
                fits.append(solved(net, original, plan, name, found, calls, strength, True))
            calls.clear()
    return (*fits, *(Fit(name, reason="it was not called on these batches") for name in dynamic if name not in samples))


def _dynamic(net: nn.Module, plan: Plan) -> dict[str, DynamicConv]:
    """Dynamic layers, by the name of what they replaced."""
    modules = {op.module: net.get_submodule(op.module) for op in plan.graph.convs}
    layers = {name: m.conv if isinstance(m, TokenConv) else m for name, m in modules.items()}
    return {name: layer for name, layer in layers.items() if isinstance(layer, DynamicConv)}


def _recorded(
    net: nn.Module, layer: Any, batches: Sequence[Any], calls: Sequence[Sequence[Sample]], parts: list[_Part]
) -> str:
    """Note what a layer reads, on every batch; a reason where that can't be."""
    features: list[Tensor | None] = [None]

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        features[0] = layer.handover.take(layer.reader, args[0])
        layer.handover.put(features[0])  # back, for the layer itself

    def take(x: Tensor, sample: Sample) -> None:
        parts.append(_Part(x, features[0], sample))

    handle = layer.register_forward_pre_hook(look) if getattr(layer, "reader", None) is not None else None
    try:
        return collect(net, layer, batches, calls, take)
    finally:
        if handle is not None:
            handle.remove()


class _Fitting:
    """One layer's descent.

    Args:
        layer: In eval mode.
        parts: What it reads and should compute.
        constant: What is added to its outputs.
        seed: Of the order of mini-batches.
    """

    def __init__(self, layer: Any, parts: Sequence[_Part], constant: Constant, seed: int) -> None:
        self.layer, self.constant = layer, constant
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = torch.promote_types(next(layer.parameters()).dtype, torch.float32)
        self.fit: list[_Part] = []
        self.held: list[_Part] = []
        for part in parts:
            held = part.sample.held_out
            self.fit += [part.at(at) for at in (~held).nonzero().squeeze(1).split(_IMAGES)]
            self.held += [part.at(at) for at in held.nonzero().squeeze(1).split(_IMAGES) if len(at)]
        taken = None if constant.bias is not None else constant.value  # a bias is part of what the layer computes
        self.taken = torch.zeros((), dtype=self.dtype) if taken is None else taken.to(self.dtype)

    def run(self, name: str, how: _How) -> Fit:
        """Fit it."""
        if not self.held:
            return Fit(name, reason=f"there are fewer than {EACH} images, of which one in {EACH} is held out")
        theta = {k: p.detach().to(self.dtype).clone() for k, p in self.layer.named_parameters()}
        values = torch.cat([part.sample.values.flatten(0, 1) for part in self.fit]).to(self.dtype)
        self.spread = (values - values.mean(0)).square().mean().clamp(min=torch.finfo(self.dtype).tiny)
        shift = values.new_zeros(values.shape[1])
        before = least = self.error(theta, shift)
        if not math.isfinite(before):
            raise not_finite(name)
        buffers = {k: b.clone() for k, b in self.layer.named_buffers()}
        self.layer.anneal(1.0)
        best: tuple[dict[str, Tensor], Tensor] | None = None
        for found in self.descent(theta, shift, how):
            error = self.error(*found)
            if error < least:
                least, best = error, found
        if best is None:
            for k, b in self.layer.named_buffers():
                b.copy_(buffers[k])
        else:
            for k, p in self.layer.named_parameters():
                p.copy_(best[0][k])
            self.constant.add(best[1])
        return Fit(name, before, least)

    @torch.enable_grad()
    def descent(self, start: dict[str, Tensor], shift: Tensor, how: _How) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Parameters and the constant, at intervals."""
        with torch.no_grad(), _inputs_of(getattr(self.layer, "router", None)) as features:
            away = torch.cat([self.residual(start, shift, part).flatten(0, 1) for part in self.fit])
        if self.constant.free:
            shift = shift - away.mean(0)
            yield start, shift
        router = _Router.of(start, features)
        slow = [k for k in start if k not in (*self.layer.shared, "bias", *([] if router is None else router.names))]
        free = {k: start[k].clone().requires_grad_() for k in slow}
        shift = shift.clone().requires_grad_(self.constant.free)
        quick = [] if router is None else router.learned
        rates = [(quick, how.rate), ([*free.values(), *[shift] * self.constant.free], how.rate * _SLOWER)]
        adam = torch.optim.Adam([{"params": params, "lr": rate} for params, rate in rates if params])
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, how.steps)
        order: list[int] = []
        for step in range(1, how.steps + 1):
            order = order or torch.randperm(len(self.fit), generator=self.generator).tolist()
            theta = {**start, **free, **({} if router is None else router.made())}
            loss = self.residual(theta, shift, self.fit[order.pop()]).square().mean() / self.spread
            if how.decay:
                loss = loss + how.decay * sum((theta[k] - start[k]).square().sum() for k in start)
            adam.zero_grad()
            loss.backward()
            adam.step()
            fall.step()
            if step % max(1, how.steps // _LOOKS) == 0:
                theta = {**start, **free, **({} if router is None else router.made())}
                yield {k: p.detach().clone() for k, p in theta.items()}, shift.detach().clone()

    def error(self, theta: dict[str, Tensor], shift: Tensor) -> float:
        """On the images held out, over the variance of what is wanted."""
        with torch.no_grad():
            squares = [self.residual(theta, shift, part).square().mean((1, 2)).sum() for part in self.held]
        return float(torch.stack(squares).sum() / sum(len(part.x) for part in self.held) / self.spread)

    def residual(self, theta: dict[str, Tensor], shift: Tensor, part: _Part) -> Tensor:
        """[B, P, out] of a mini-batch."""
        if part.features is not None:
            self.layer.handover.put(part.features)
        out = functional_call(self.layer, theta, (part.x.to(self.dtype),))
        at = places_last(self.layer, out).take_along_dim(part.sample.places.unsqueeze(2), 1)
        return at + (self.taken + shift) - part.sample.values.to(self.dtype)


@contextmanager
def _inputs_of(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """What a module reads, call by call."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


class _Router:
    """A layer's router, learned along the principal components z = K (h - mu) of what it reads.

    W = W0 + U K and b = b0 + c - U K mu, so that c and U are learned, of which each means as much as the other, and
    directions in which images hardly differ can't be overfitted.
    """

    names = ("router.weight", "router.bias")

    def __init__(self, start: Mapping[str, Tensor], features: Tensor) -> None:
        self.weight, self.bias = start["router.weight"], start.get("router.bias")
        h = features.to("cpu", torch.float64)
        mean = h.mean(0) * (self.bias is not None)  # without a bias nothing takes the mean up
        values, vectors = torch.linalg.eigh((h - mean).T @ (h - mean) / len(h))
        most = (values > 1e-6 * values[-1].clamp(min=1e-30)).nonzero().squeeze(1).flip(0)[:_COMPONENTS]
        self.k = (vectors[:, most] / values[most].sqrt()).T.to(self.weight)
        self.mean = mean.to(self.weight)
        self.u = self.weight.new_zeros(len(self.weight), len(most)).requires_grad_()
        self.c = self.weight.new_zeros(len(self.weight)).requires_grad_()
        self.learned = [self.u] if self.bias is None else [self.u, self.c]

    @classmethod
    def of(cls, start: Mapping[str, Tensor], features: Sequence[Tensor]) -> _Router | None:
        """None for a layer whose router is not a linear layer by that name."""
        return cls(start, torch.cat(list(features))) if features and "router.weight" in start else None

    def made(self) -> dict[str, Tensor]:
        """Its parameters."""
        change = self.u @ self.k
        if self.bias is None:
            return {"router.weight": self.weight + change}
        return {"router.weight": self.weight + change, "router.bias": self.bias + self.c - change @ self.mean}
