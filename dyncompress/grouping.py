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


def operation(net: nn.Module, recording: Recording, closed: Closed, op: Recorded) -> Operation:
    """A recorded op in terms of width groups."""
    own = closed.classes[op.writes.numpy()].tolist() if op.writes is not None else []
    kept = all(c not in closed.place for c in own)
    reason = next((closed.pinned[c] for c in own if c in closed.pinned), "") if kept else ""
    spec, block, norm = _replaceable(net, recording, op.module, op.weight), "", ""
    if spec is not None:
        inside = [b for b in recording.residual_modules if b and op.module.startswith(b + ".")]
        block, norm = max(inside, key=len, default=""), recording.norms.get(op.module, "")
        batches = {o.batch for o in recording.operations if o.module.startswith(f"{block}.")}
        block = block if len(batches) == 1 else ""  # layers that see different batches can't share a router
    extents = tuple(extent(closed.runs(ids)) for ids in op.axes)
    return Operation(op.module, op.kind, op.weight, op.fixed, extents, op.positions, spec, block, norm, reason)


def _replaceable(net: nn.Module, recording: Recording, name: str, weight: str) -> ConvSpec | None:
    module = net.get_submodule(name)
    if recording.calls[name] > 1:
        return None
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and weight == f"{name}.weight":
        return ConvSpec.of(module)  # type: ignore[arg-type]
    return None


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
