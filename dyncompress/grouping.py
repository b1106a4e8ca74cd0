"""From labels to width groups: channels that must be cut together, wherever they pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from dyncompress.graph import Group, Operation, extent
from dyncompress.layers import ConvSpec
from dyncompress.narrowing import Runs, encode
from dyncompress.recording import Operation as Recorded
from dyncompress.recording import Recording


@dataclass
class Closed:
    """Channel classes, and the width groups that they form."""

    classes: np.ndarray
    pinned: dict[int, str]
    members: list[list[int]]

    def __post_init__(self) -> None:
        self.place = {c: (g, i) for g, group in enumerate(self.members) for i, c in enumerate(group)}

    def runs(self, labels: Tensor) -> Runs:
        """An axis in terms of width groups."""
        where = [self.place.get(c, (-1, 0)) for c in self.classes[labels.numpy()].tolist()]
        return encode([w[0] for w in where], [w[1] for w in where])

    def groups(self, labels: np.ndarray) -> set[int]:
        """Width groups that some labels belong to."""
        return {self.place[c][0] for c in np.unique(self.classes[labels]).tolist() if c in self.place}


def members(
    recording: Recording, classes: np.ndarray, pinned: Mapping[int, str], counted: Sequence[Tensor]
) -> list[list[int]]:
    """Width groups as lists of classes: classes that occupy the same axes, and are counted, equally often."""
    places: dict[int, dict[Any, int]] = defaultdict(lambda: defaultdict(int))
    useful: set[int] = set()
    every: dict[Any, Tensor] = dict(recording.axes)
    for name, seam in recording.seams.items():
        every |= {(name, "in"): seam.entering, (name, "out"): seam.leaving}
    every |= {("count", i): ids for i, ids in enumerate(counted)}
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
    return [group for group in groups.values() if len(group) > 1]


def agreed(counts: Any) -> dict[str, Runs]:
    """Attributes that count the channels of a group; one that would have to count two different things is left."""
    found: dict[str, set[Runs]] = defaultdict(set)
    for key, runs in counts:
        found[key].add(runs)
    return {
        key: next(iter(several))
        for key, several in found.items()
        if len(several) == 1 and any(group >= 0 for runs in several for group, *_ in runs)
    }


_TIED = "its channels are tied to each other: all of them go, or none"


def replaceable(net: nn.Module, recording: Recording, linear: bool) -> list[str]:
    """Paths of the plain convolutions that ran, and of the linear layers if those are asked for."""
    found = [op.module for op in recording.operations if not _obstacle(net, op, linear)]
    return list(dict.fromkeys(found))


def operations(
    net: nn.Module, recording: Recording, closed: Closed, missed: Mapping[str, str], linear: bool
) -> tuple[Operation, ...]:
    """Recorded ops in terms of width groups; one that can become dynamic stands once for all of its calls.

    Args:
        net: The network.
        recording: Of its run.
        closed: Its width groups.
        missed: Layers that its code needs as they are, and what it said.
        linear: Whether linear layers can become dynamic, too.
    """
    calls: dict[str, list[Recorded]] = defaultdict(list)
    for op in recording.operations:
        if op.module not in missed and not _obstacle(net, op, linear):
            calls[op.module].append(op)
    blocks = _blocks(recording, calls)
    found = []
    for op in recording.operations:
        again = calls.get(op.module, [op])
        if again[0] is not op:
            continue
        own = closed.classes[op.writes.numpy()].tolist() if op.writes is not None else []
        kept = all(c not in closed.place for c in own)
        reason = (
            next((closed.pinned[c] for c in own if c in closed.pinned), _TIED if len(own) > 1 else "") if kept else ""
        )
        extents = tuple(extent(closed.runs(ids)) for ids in op.axes)
        spec, block, norm, runs = None, "", "", ()
        weighted = op.kind.startswith("conv") or (linear and bool(op.weight))
        static = _obstacle(net, op, linear) if weighted else ""
        if weighted and op.module in missed and not static:
            static = f"the network's code reads it ({missed[op.module]})"
        kind = op.kind
        if op.module in calls:
            kind = "conv" if kind == "conv" else "linear"
            spec = ConvSpec.of(net.get_submodule(op.module))  # type: ignore[arg-type]
            block, norm = blocks[op.module], recording.norms.get(op.module, "")
            runs = tuple((call.positions, call.images) for call in again)  # type: ignore[assignment]
        found.append(
            Operation(op.module, kind, op.weight, op.fixed, extents, op.positions, spec, block, norm, reason, static,
                      runs)
        )  # fmt: skip
    return tuple(found)


def _obstacle(net: nn.Module, op: Recorded, linear: bool) -> str:
    """Why a product can't become a dynamic convolution."""
    module = net.get_submodule(op.module)
    if linear and op.kind == "matmul" and op.weight:
        return _linear_obstacle(module, op)
    if op.kind != "conv":
        return "a transposed convolution" if op.kind == "conv_transpose" else "no convolution"
    if not isinstance(module, nn.modules.conv._ConvNd):
        return "called as a function, outside a convolution's module"
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"a {type(module).__name__} runs code of its own"
    return "" if op.weight == f"{op.module}.weight" else "its weight is computed"


def _linear_obstacle(module: nn.Module, op: Recorded) -> str:
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__} runs code of its own"
    if op.weight != f"{op.module}.weight":
        return "its weight is computed, or another layer's, too"
    if op.images != 1:
        return f"reads {op.images} entries of one image along the first dimension, which is the batch of a convolution"
    return "" if op.positions else "reads a single vector"


def _blocks(recording: Recording, calls: Mapping[str, Sequence[Recorded]]) -> dict[str, str]:
    """The residual block around each convolution, where its convolutions run once and see the same images."""
    around = {}
    for name in calls:
        inside = [b for b in recording.residual_modules if b and name.startswith(b + ".")]
        around[name] = max(inside, key=len, default="")
    for block in set(around.values()):
        inside = [name for name, found in around.items() if found == block]
        if len({call.images for name in inside for call in calls[name]}) > 1 or any(len(calls[n]) > 1 for n in inside):
            around |= dict.fromkeys(inside, "")
    return around


def named(members: Sequence[Sequence[int]], operations: Sequence[Operation]) -> tuple[Group, ...]:
    """Width groups, each named after the first layer that writes it."""
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
