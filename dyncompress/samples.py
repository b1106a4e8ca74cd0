"""What layers computed in the original, at a sample of places, and what they read in the student there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncompress.graph import as_call
from dyncompress.layers import ConvSpec
from dyncompress.narrowing import positions
from dyncompress.plan import Plan

__all__ = ["EACH", "ROWS", "Sample", "collect", "patches_of", "places_last", "sampled"]

ROWS = 1 << 13
EACH = 5  # of so many images one is held out


class _EnoughError(BaseException):
    """The layer has run. A BaseException, so that the network's ``except Exception`` does not hold it up."""


@dataclass
class Sample:
    """What one call of a layer computed in the original.

    Attributes:
        places: [B, P], of its output.
        values: [B, P, out].
        held_out: [B], which images decide what dynamics are kept, and are not fitted to: every fifth of all.
    """

    places: Tensor
    values: Tensor
    held_out: Tensor

    def at(self, images: Tensor) -> Sample:
        """Of some of its images."""
        return Sample(self.places[images], self.values[images], self.held_out[images])


def sampled(
    original: nn.Module, plan: Plan, names: Sequence[str], batches: Sequence[Any], rows: int, seed: int
) -> dict[str, list[list[Sample]]]:
    """Per layer, in the order in which they run, and per batch: a sample of every call."""
    kept = [k for k in plan.keep if not isinstance(k, int)]
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[list[Sample]]] = {}
    at_batch = 0

    def watch(name: str) -> Any:
        runs = plan.graph.axes.get(f"{name}.weight:0")
        stay = None if runs is None else torch.tensor(positions(runs, kept))

        def look(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            maps = places_last(module, out)
            images, places, _ = maps.shape
            share = max(1, rows // max(1, images * len(batches)))
            if share < places:
                at = torch.randint(places, (images, share), generator=generator).to(out.device)
            else:
                at = torch.arange(places, device=out.device).expand(images, places)
            values = maps.take_along_dim(at.unsqueeze(2), 1)
            values = values if stay is None else values[..., stay.to(out.device)]
            of_layer = samples.setdefault(name, [[] for _ in batches])
            first = sum(len(calls[0].places) for calls in of_layer[:at_batch] if calls)
            number = first + torch.arange(images, device=out.device)
            of_layer[at_batch].append(Sample(at, values, number % EACH == EACH - 1))

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


def batched(module: nn.Module, t: Tensor) -> Tensor:
    """Input or output of a layer with its batch dimension: [images, ..., channels] or [images, channels, ...]."""
    least = 2 if isinstance(module, nn.Linear) else len(module.kernel_size) + 2  # type: ignore[arg-type]
    return t if t.dim() >= least else t.unsqueeze(0)


def places_last(module: nn.Module, t: Tensor) -> Tensor:
    """Input or output of a layer as [images, places, channels]."""
    t = batched(module, t)
    if isinstance(module, nn.Linear):
        return t.reshape(t.shape[0], -1, t.shape[-1])
    return t.flatten(2).transpose(1, 2)


def patches_of(module: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """What a layer reads at places [B, P] of its output: [groups, B * P, in / groups * taps], as its weight has it.

    The input x has a batch dimension.
    """
    if isinstance(module, nn.Linear):
        read = places_last(module, x).take_along_dim(places.unsqueeze(2), 1)
        return read.flatten(0, 1).unsqueeze(0)
    spec = ConvSpec.of(module)  # type: ignore[arg-type]
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


def collect(
    net: nn.Module,
    layer: nn.Module,
    batches: Sequence[Any],
    calls: Sequence[Sequence[Sample]],
    take: Callable[[Tensor, Sample], None],
) -> str:
    """Run the network up to a layer on every batch and hand on what the layer reads; a reason where that can't be.

    What is handed on has a batch dimension, also where the layer reads a single image without one.
    """
    waiting: list[Sample] = []
    odd = ""

    def look(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        nonlocal odd
        sample, x = waiting.pop(0), args[0]
        if places_last(module, out).shape[::2] != (len(sample.places), sample.values.shape[2]):
            odd = "what it computes has another shape than in the original"
        elif not odd:
            take(batched(layer, x), sample)
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
