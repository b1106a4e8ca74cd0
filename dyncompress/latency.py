"""Latency by pairs: how long one network takes as a multiple of another, on a machine that is not exclusive.

A shared machine drifts by more than two networks differ. So all networks take turns within each round, and
only times of the same round are compared. Fold BatchNorms first where deployment would.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dyncompress.errors import DynCompressError
from dyncompress.graph import as_call

MIN_ROUNDS = 5  # below this a quartile says nothing


@dataclass(frozen=True)
class Latency:
    """Measured time of one forward pass at one batch size.

    Attributes:
        median_ms: Median time of a forward pass, in milliseconds per batch.
        ratio: Median over the rounds of (time of this network / time of the first network in the same round).
        iqr: Interquartile range of those ratios; for the first network, whose ratios are all 1, that of its
            own times over their median. Differences of ratios below it mean nothing.
    """

    median_ms: float
    ratio: float
    iqr: float


def measure_latency(
    nets: Mapping[str, nn.Module],
    example: Any,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    budget_s: float = 5.0,
) -> dict[str, dict[int, Latency]]:
    """Time forward passes of several networks against each other.

    Every round runs A B C ... C B A, so that a drift hits all networks alike; a network's time in a round is
    the mean of its two passes, and its ratio is taken to the first network's time in the same round.

    Args:
        nets: Networks by name; the first is what the others are compared with.
        example: One batch of their inputs: a tensor, a tuple of positional or a dict of keyword arguments.
            Its leading dimension is repeated or cut to each batch size.
        batch_sizes: Batch sizes to measure.
        rounds: Rounds per batch size, at least 5.
        warmup: Untimed rounds before them.
        threads: Threads of torch while measuring; default: as they are.
        budget_s: Seconds per batch size after which no further round starts (warm-up: a quarter of it); 5
            timed rounds and one warm-up round run in any case.

    Returns:
        ``{name: {batch_size: Latency}}``. Training flags and the thread count are left as they were.

    Raises:
        DynCompressError: If there is nothing to measure or to repeat, or the networks are on several devices.
    """
    if not nets or not batch_sizes or min(batch_sizes) < 1 or rounds < MIN_ROUNDS:
        raise DynCompressError(
            f"cannot time {len(nets)} networks at batch sizes {tuple(batch_sizes)} in {rounds} rounds - "
            f"at least one network, batch sizes from 1, {MIN_ROUNDS} rounds or more - correct the argument"
        )
    devices = {device_of(net) for net in nets.values()}
    if len(devices) > 1:
        raise DynCompressError(
            f"the networks are on several devices ({', '.join(sorted(map(str, devices)))}) - times can be "
            "compared on one only - move them to the same device first"
        )
    device = devices.pop()
    found: dict[str, dict[int, Latency]] = {name: {} for name in nets}
    with _threads(threads), evaluating(*nets.values()), torch.inference_mode():
        for size in batch_sizes:
            inputs = move(resize_batch(example, size), device)
            passes = [partial(run, net, inputs) for net in nets.values()]
            times = interleave(passes, device, rounds=rounds, warmup=warmup, budget_s=budget_s)
            for index, name in enumerate(nets):
                found[name][size] = summarise(times, index)
    return found


def resize_batch(example: Any, size: int) -> Any:
    """The example with its leading dimension repeated or cut to ``size``.

    Args:
        example: A tensor (B, ...), or a tuple, list or dict of arguments. Tensors whose leading dimension is
            not B (the first tensor's) do not depend on the batch: they stay as they are.
        size: The new B.

    Example:
        >>> resize_batch(torch.tensor([1, 2]), 5)
        tensor([1, 2, 1, 2, 1])
    """
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if not tensors or len(tensors[0]) == 0:
        raise DynCompressError(
            f"the example ({type(example).__name__}) holds no batch to repeat - a tensor with a leading "
            "batch dimension, or a tuple or dict with one - pass one real batch of inputs"
        )
    batch = len(tensors[0])

    def resize(leaf: Any) -> Any:
        fits = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch
        return leaf[torch.arange(size, device=leaf.device) % batch] if fits else leaf

    return tree_map(resize, example)


@contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each submodule has its own flag again (a frozen BatchNorm stays frozen)."""
    flags = [(module, module.training) for net in nets for module in net.modules()]
    try:
        for net in nets:
            net.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def run(net: nn.Module, inputs: Any) -> Any:
    """One forward pass on a tensor, a tuple of positional or a dict of keyword arguments."""
    args, kwargs = as_call(inputs)
    return net(*args, **kwargs)


def device_of(net: nn.Module) -> torch.device:
    """Where the parameters of a network are."""
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))


def move(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with its tensors on another device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def interleave(
    passes: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
    budget_s: float = 5.0,
) -> list[list[float]]:
    """Time anything that can be called, in rounds A B C ... C B A.

    Args:
        passes: What takes turns, each without arguments.
        device: Where they compute; what is still under way there is waited for.
        rounds: As for `measure_latency`, and so are ``warmup`` and ``budget_s``.
        warmup: Untimed rounds before them.
        budget_s: Seconds after which no further round starts.

    Returns:
        Seconds per pass: one list per round with one time per callable, the mean of its two passes.
    """
    synchronize: Callable[[], None] = getattr(torch, device.type).synchronize  # does nothing on the CPU

    def one_pass(call: Callable[[], Any]) -> float:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - start

    def one_round() -> list[float]:
        there = [one_pass(call) for call in passes]
        back = [one_pass(call) for call in reversed(passes)]
        return [(a + b) / 2 for a, b in zip(there, reversed(back), strict=True)]

    def repeat(most: int, least: int, seconds: float) -> list[list[float]]:
        done: list[list[float]] = []
        end = time.perf_counter() + seconds
        while len(done) < most and (len(done) < least or time.perf_counter() < end):
            done.append(one_round())
        return done

    gc.collect()  # a collection in mid-round would be charged to whoever runs then
    repeat(max(warmup, 1), 1, budget_s / 4)
    return repeat(rounds, MIN_ROUNDS, budget_s)


def summarise(times: Sequence[Sequence[float]], index: int, base: int = 0) -> Latency:
    """What the rounds of `interleave` say of one callable against another.

    Example:
        >>> summarise([[1, 2], [1, 3], [2, 8], [1, 5], [1, 6]], 1)
        Latency(median_ms=5000, ratio=4.0, iqr=2.0)
    """
    own = [row[index] for row in times]
    median = statistics.median(own)
    ratios = [row[index] / row[base] for row in times]
    spread = [value / median for value in own] if index == base else ratios
    low, _, high = statistics.quantiles(spread, n=4, method="inclusive")
    return Latency(median_ms=1000 * median, ratio=statistics.median(ratios), iqr=high - low)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
