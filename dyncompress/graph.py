"""The channel graph of a network: its convolutions, and the groups of channels that must be cut together.

Plain values: `tracing.trace` finds them, a plan carries them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dyncompress.layers import ConvSpec
from dyncompress.narrowing import Runs, length

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
    kind: str  # conv, conv_transpose, matmul; linear, where that is a layer that can become dynamic
    weight: str
    fixed: int
    axes: tuple[Extent, ...]
    positions: int
    spec: ConvSpec | None = None  # set where the module is a plain layer, which can become dynamic
    block: str = ""  # the residual block around it, where the network shows one
    norm: str = ""  # the BatchNorm that alone reads its result, and can be folded into it
    reason: str = ""  # why its output channels are pinned
    static: str = ""  # why it can't become dynamic, where it is a convolution that can't
    runs: tuple[tuple[int, int], ...] = ()  # positions and images of every call, where it can become dynamic


@dataclass(frozen=True)
class ConvGraph:
    """What can be cut, and what it costs. Plain values only, so that a plan can carry it."""

    operations: tuple[Operation, ...]  # in the order in which they ran
    groups: tuple[Group, ...]
    axes: Mapping[str, Runs]  # "<tensor>:<dim>" -> its channels
    seams: Mapping[str, tuple[Runs, Runs]]
    parameters: Mapping[str, tuple[int, ...]]  # name and shape of every parameter
    counts: Mapping[str, Runs] = field(default_factory=dict)  # "<module>:<attribute>[:<index>]" -> channels it counts
    unseen: tuple[str, ...] = ()  # modules with parameters that the example never ran: left as they are
    rescaled: tuple[str, ...] = ()  # results that depend on how many channels there are: a mean over them, say

    @property
    def fingerprint(self) -> str:
        """Names and shapes of the network's parameters, hashed."""
        text = "\n".join(f"{name} {tuple(shape)}" for name, shape in self.parameters.items())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def convs(self) -> tuple[Operation, ...]:
        """Convolutions that a method can replace, and linear layers where it takes those."""
        return tuple(op for op in self.operations if op.spec is not None)

    @property
    def anchor(self) -> str:
        """The module that carries the plan: the first convolution that is one, else the network itself."""
        return next((op.module for op in (*self.convs, *self.operations) if op.kind.startswith("conv")), "")

    @property
    def pinned(self) -> dict[str, str]:
        """Layers whose output channels can't be cut, and why."""
        return {op.module: op.reason for op in self.operations if op.reason}


def bare(network: nn.Module) -> nn.Module:
    """The network inside what `torch.compile` returns; any other is returned as it is."""
    inner = network._modules.get("_orig_mod")
    return network if inner is None else inner


def duplicate(net: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy of a network.

    Args:
        net: Any network; weights that a hook computes (weight norm, pruning) are no obstacle.
        share: Whether the copy's parameters share their storage with the original's, until their ``data`` is assigned.
    """
    memo: dict[int, Any] = {}
    for module in net.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    if share:
        eager = [m for m in net.modules() if not isinstance(m, torch.jit.ScriptModule)]  # those make theirs anew
        memo |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for m in eager for p in m.parameters(recurse=False)}
    with torch.no_grad():  # else the copy of a scripted module's weights is a function of them, and no leaf
        twin = deepcopy(net, memo)
    for before, after in zip(net.parameters(), twin.parameters(), strict=True):
        after.requires_grad_(before.requires_grad)
    return twin


@contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, no change of random numbers, no kernels that fuse whole layers."""
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments of ``forward``."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in whatever a network takes or returns: containers, dataclasses and other objects."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
        elif isinstance(leaf, (list, tuple, set)):
            found += tensors_in(list(leaf))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            found += tensors_in(list(vars(leaf).values()))
    return found


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


def misfit(net: nn.Module, graph: ConvGraph) -> str:
    """The first place where a network is not what a graph says of it, beside its parameters; '' where there is none.

    A plan may be a file from anywhere: it changes no attribute but a number of channels, and that only from the number
    that it expects there.
    """
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    modules = dict(net.named_modules(remove_duplicate=False))
    for op in graph.operations:
        module = modules.get(op.module)
        if op.kind.startswith("conv") and module is None:
            return f"the network has no module '{op.module}'"
        if op.spec is not None:
            plain = (nn.Linear,) if op.kind == "linear" else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            found = ConvSpec.of(module) if type(module) in plain else None  # type: ignore[arg-type]
            if found != op.spec:
                return f"'{op.module}' is {found or type(module).__name__}, the plan expects {op.spec}"
    for key, runs in graph.axes.items():
        name, _, dim = key.rpartition(":")
        shape = tuple(tensors[name].shape) if name in tensors else ()
        if not int(dim) < len(shape) or shape[int(dim)] != length(runs):
            return f"'{name}' has shape {shape}, the plan expects {length(runs)} channels in dimension {dim}"
    for key, runs in graph.counts.items():
        path, attribute, *at = key.split(":")
        value = vars(modules[path]).get(attribute) if path in modules else None
        if at and isinstance(value, (tuple, list)):
            value = value[int(at[0])] if int(at[0]) < len(value) else None
        elif at:
            value = None
        if type(value) is not int or value != length(runs):
            return f"attribute '{attribute}' of '{path}' counts no channels, of which the plan expects {length(runs)}"
    seam = next((name for name in graph.seams if name not in modules), None)
    return "" if seam is None else f"the network has no module '{seam}'"


def extent(runs: Runs) -> Extent:
    """Size of an axis as fixed channels and channels per kept channel of each group."""
    fixed = sum(count for group, _, count, _ in runs if group < 0)
    totals: dict[int, int] = defaultdict(int)
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for group, start, count, repeat in runs:
        if group >= 0:
            totals[group] += count * repeat
            spans[group].append((start, start + count))
    return fixed, tuple((group, totals[group] // _covered(spans[group])) for group in totals)


def _covered(spans: list[tuple[int, int]]) -> int:
    """How many channels lie in one of the spans, from start up to end; none of them is counted out."""
    covered, reached = 0, 0
    for start, end in sorted(spans):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered
