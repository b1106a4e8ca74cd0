"""The channel graph of a network: its convolutions, and the groups of channels that must be cut together.

`trace` runs the network once on an example, follows the channel labels (`propagation.py`), closes the ties into
width groups, and verifies them by cutting a copy and running it. A channel that can't be cut is pinned, and the
graph says why.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dyncompress.errors import TraceError
from dyncompress.layers import ConvSpec
from dyncompress.narrowing import Runs, cut, encode
from dyncompress.propagation import Propagation, Recording
from dyncompress.rules import rule_for

Extent = tuple[int, tuple[tuple[int, int], ...]]
"""Size of an axis as a function of the widths: fixed channels + sum over (group, channels per kept one)."""


@dataclass(frozen=True)
class Group:
    """Channels that are cut together, here and wherever else they pass: any subset of them can go."""

    name: str  # the first convolution or linear layer that writes them
    channels: int


@dataclass(frozen=True)
class Operation:
    """A product of the network and its cost: ``macs = fixed * prod(extent of each axis)``, for one image."""

    module: str
    kind: str  # conv, conv_transpose, matmul
    weight: str
    fixed: int
    axes: tuple[Extent, ...]
    positions: int
    spec: ConvSpec | None = None  # set where the module is a plain convolution, which can become dynamic
    block: str = ""  # the residual block around it, where the network shows one
    norm: str = ""  # the BatchNorm that alone reads its result, and can be folded into it
    reason: str = ""  # why its output channels are pinned


@dataclass(frozen=True)
class ConvGraph:
    """What can be cut, and what it costs. Plain values only, so that a plan can carry it."""

    operations: tuple[Operation, ...]  # in the order in which they ran
    groups: tuple[Group, ...]
    axes: Mapping[str, Runs]  # "<tensor>:<dim>" -> its channels
    seams: Mapping[str, tuple[Runs, Runs]]
    parameters: Mapping[str, tuple[int, ...]]  # name and shape of every parameter

    @property
    def fingerprint(self) -> str:
        """Names and shapes of the network's parameters, hashed."""
        text = "\n".join(f"{name} {tuple(shape)}" for name, shape in self.parameters.items())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def convs(self) -> tuple[Operation, ...]:
        """Convolutions that a method can replace."""
        return tuple(op for op in self.operations if op.spec is not None)

    @property
    def pinned(self) -> dict[str, str]:
        """Layers whose output channels can't be cut, and why."""
        return {op.module: op.reason for op in self.operations if op.reason}


def bare(network: nn.Module) -> nn.Module:
    """The network inside what `torch.compile` returns; any other is returned as it is."""
    inner = network._modules.get("_orig_mod")
    return network if inner is None else inner


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments of ``forward``."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def one_image(example: Any) -> Any:
    """The first image of a batch (tensors that share their leading dimension are cut to length 1)."""
    leading = {t.shape[0] for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim() > 1}
    if len(leading) != 1 or leading == {1}:
        return example
    size = leading.pop()
    return tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.dim() and t.shape[0] == size else t, example)


def parameter_shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a network, in its own order."""
    return {name: tuple(t.shape) for name, t in net.named_parameters()}


def trace(net: nn.Module, example: Any) -> ConvGraph:
    """Find the convolutions of a network and the groups of channels that must be cut together.

    The network is left as it was: a copy runs, once, in eval mode on one image.

    Args:
        net: Any network.
        example: What its ``forward`` takes: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Returns:
        The channel graph, verified by running a cut copy.

    Raises:
        TraceError: If the network fails on the example, or has no convolution.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> graph = trace(net, torch.zeros(1, 3, 8, 8))
        >>> graph.groups
        (Group(name='0', channels=8),)
        >>> graph.pinned
        {'2': 'output of the network'}
    """
    if not isinstance(net, nn.Module):
        raise TraceError(f"can't trace a {type(net).__name__}; pass a torch.nn.Module")
    args, kwargs = as_call(one_image(example))
    copy = deepcopy(bare(net)).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            expected = copy(*args, **kwargs)
        except Exception as error:
            raise TraceError(
                f"{type(net).__name__} fails on the example ({_shapes((args, kwargs))}): {error}; pass an example that"
                " its forward takes (a tensor, a tuple of arguments or a dict of keyword arguments)"
            ) from error
        with Propagation(copy, rule_for) as mode:
            output = copy(*args, **kwargs)
        mode.pin([t for t in tree_leaves(output) if isinstance(t, Tensor)], "output of the network")
    recording = mode.recording
    if not any(op.kind.startswith("conv") for op in recording.operations):
        raise TraceError(
            f"{type(net).__name__} runs no convolution on the example; dyncompress compresses convolutions"
        )
    classes, pinned = recording.ledger.classes()
    graph = _build(copy, recording, classes, pinned)
    while broken := _verify(copy, graph, args, kwargs, expected):  # fewer groups each turn
        members = _members(recording, classes, pinned)
        pinned |= {c: reason for group, reason in broken.items() for c in members[group]}
        graph = _build(copy, recording, classes, pinned)
    return graph


def _shapes(values: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tree_leaves(values) if isinstance(t, Tensor)) or "no tensors"


def _members(recording: Recording, classes: np.ndarray, pinned: Mapping[int, str]) -> list[list[int]]:
    """Width groups as lists of classes: classes that occupy the same axes equally often."""
    places: dict[int, dict[Any, int]] = defaultdict(lambda: defaultdict(int))
    useful: set[int] = set()
    every = {**recording.axes, **{(n, d): ids for n, s in recording.seams.items() for d, ids in _sides(s)}}
    for axis, ids in every.items():
        for c in classes[ids.numpy()].tolist():
            places[c][axis] += 1
    for op in recording.operations:
        for ids in op.axes:
            useful.update(classes[ids.numpy()].tolist())
    groups: dict[Any, list[int]] = defaultdict(list)
    for c, where in places.items():  # insertion order: that of the network's run
        if c != 0 and c not in pinned and c in useful:
            groups[frozenset(where.items())].append(c)
    return [members for members in groups.values() if len(members) > 1]


def _sides(seam: Any) -> list[tuple[int, Tensor]]:
    return [(-1, seam.entering), (-2, seam.leaving)]


def _build(net: nn.Module, recording: Recording, classes: np.ndarray, pinned: Mapping[int, str]) -> ConvGraph:
    members = _members(recording, classes, pinned)
    place = {c: (g, i) for g, group in enumerate(members) for i, c in enumerate(group)}

    def runs(ids: Tensor) -> Runs:
        where = [place.get(c, (-1, 0)) for c in classes[ids.numpy()].tolist()]
        return encode([w[0] for w in where], [w[1] for w in where])

    axes = {f"{name}:{dim}": runs(ids) for (name, dim), ids in recording.axes.items()}
    axes = {key: r for key, r in axes.items() if any(group >= 0 for group, *_ in r)}
    operations = []
    for op in recording.operations:
        out_ids = recording.axes.get((op.weight, 1 if op.kind == "conv_transpose" else 0))
        own = classes[out_ids.numpy()].tolist() if out_ids is not None else []
        reason = next((pinned[c] for c in own if c in pinned), "") if all(c not in place for c in own) else ""
        extents = tuple(extent(runs(ids)) for ids in op.axes)
        spec, block = _replaceable(net, recording, op.module, op.weight), ""
        if spec is not None:
            inside = [b for b in recording.residual_modules if b and op.module.startswith(b + ".")]
            block = max(inside, key=len, default="")
        norm = recording.norms.get(op.module, "") if spec is not None else ""
        operations.append(
            Operation(op.module, op.kind, op.weight, op.fixed, extents, op.positions, spec, block, norm, reason)
        )
    seams = {name: (runs(s.entering), runs(s.leaving)) for name, s in recording.seams.items()}
    return ConvGraph(tuple(operations), _named(members, operations), axes, seams, parameter_shapes(net))


def extent(runs: Runs) -> Extent:
    """Size of an axis as fixed channels and channels per kept channel of each group."""
    fixed = sum(count for group, _, count, _ in runs if group < 0)
    totals: dict[int, int] = defaultdict(int)
    seen: dict[int, set[int]] = defaultdict(set)
    for group, start, count, repeat in runs:
        if group >= 0:
            totals[group] += count * repeat
            seen[group].update(range(start, start + count))
    return fixed, tuple((group, totals[group] // len(seen[group])) for group in totals)


def _replaceable(net: nn.Module, recording: Recording, name: str, weight: str) -> ConvSpec | None:
    module = net.get_submodule(name)
    if recording.calls[name] > 1:
        return None
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and weight == f"{name}.weight":
        return ConvSpec.of(module)  # type: ignore[arg-type]
    return None


def _named(members: Sequence[Sequence[int]], operations: Sequence[Operation]) -> tuple[Group, ...]:
    names: dict[int, str] = {}
    for op in operations:
        writes = op.axes[:1] if op.kind == "conv" else op.axes[1:2]
        for _, parts in writes:
            for group, _ in parts:
                names.setdefault(group, op.module)
    used: dict[str, int] = defaultdict(int)
    groups = []
    for g, channels in enumerate(members):
        name = names.get(g, f"group{g}")
        used[name] += 1
        groups.append(Group(name if used[name] == 1 else f"{name}#{used[name]}", len(channels)))
    return tuple(groups)


def _verify(net: nn.Module, graph: ConvGraph, args: Any, kwargs: Any, expected: Any) -> dict[int, str]:
    """Groups that the forward code can't follow, found by cutting copies of the network, halving the suspects."""
    shapes = [tuple(t.shape) for t in tree_leaves(expected) if isinstance(t, Tensor)]
    broken: dict[int, str] = {}

    def failure(groups: Sequence[int]) -> str:
        kept = [range(g.channels // 2 if i in groups else g.channels) for i, g in enumerate(graph.groups)]
        trial = deepcopy(net)
        try:
            cut(trial, graph.axes, graph.seams, kept)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = trial(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the network's own code raises is the finding
            return f"its code doesn't follow a cut: {_first_line(error)}"
        got = [tuple(t.shape) for t in tree_leaves(found) if isinstance(t, Tensor)]
        return "" if got == shapes else f"cutting it changes the output's shape from {shapes} to {got}"

    def search(groups: Sequence[int]) -> None:
        reason = failure([g for g in groups if g not in broken]) if groups else ""
        if not reason:
            return
        if len(groups) == 1:
            broken[groups[0]] = reason
            return
        middle = len(groups) // 2
        before = len(broken)
        search(groups[:middle])
        search(groups[middle:])
        if len(broken) == before:  # each half runs alone, but not both
            broken.update(dict.fromkeys(groups, reason))

    search(range(len(graph.groups)))
    return broken


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
