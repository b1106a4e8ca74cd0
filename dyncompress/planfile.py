"""What a plan's JSON holds: its fields, their checks, and what becomes of files of before.

A file may come from anywhere, so it is read in one pass into typed values, and then held against itself: indices lie
inside what they index, axes are as long as the parameters, convolutions have the shapes of their weights. What it takes
to read a file is bounded by its length, whatever numbers it holds.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dyncompress.cost import narrow_spec, operation_macs, widths
from dyncompress.errors import DynCompressError, PlanError, shown
from dyncompress.graph import ConvGraph, Group, Operation
from dyncompress.narrowing import Runs, length
from dyncompress.typed import MistypedError, typed

SCHEMA = 2
"""1: before the graph said which attributes count channels and how often a layer runs."""
LONGEST = 2**25
"""Characters of a file; a plan of a thousand layers has a few millions."""
CHANNELS = 2**20
"""Channels of all groups together."""
PASSING = 2**22
"""Channels that enter a seam."""
Keep = int | tuple[int, ...]
AGAIN = "make it again with `dyncompress plan` and edit only 'keep', 'method' and 'options'"
_COUNT = re.compile(r"[^:]*:(?!__)[^:]+(:[0-9]{1,6})?")
_SPANS = re.compile(r"\s*\d{1,9}(-\d{1,9})?\s*(,\s*\d{1,9}(-\d{1,9})?\s*)*", re.ASCII)


@dataclass(frozen=True)
class GroupEntry:
    """What a width group keeps."""

    name: str
    channels: int
    keep: int | str


@dataclass(frozen=True)
class LayerEntry:
    """What becomes of a convolution; ``out`` and ``macs`` are there for people, and derived."""

    name: str
    method: str
    options: dict[str, Any]
    share: str
    reason: str
    out: Any
    macs: Any


@dataclass(frozen=True)
class Pace:
    """Time of the student over that of the original at batch 1, where a target asked for it; it holds on one device."""

    predicted: float
    measured: float
    device: str


@dataclass(frozen=True)
class NetworkEntry:
    """The channel graph."""

    fingerprint: str
    operations: tuple[Operation, ...]
    groups: tuple[tuple[str, int], ...]
    axes: Mapping[str, Runs]
    seams: Mapping[str, tuple[Runs, Runs]]
    counts: Mapping[str, Runs]
    unseen: tuple[str, ...]
    rescaled: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]

    def graph(self) -> ConvGraph:
        """The graph, consistent in itself.

        Raises:
            PlanError: If it is not.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(ConvGraph)}
        graph = ConvGraph(**{**fields, "groups": tuple(Group(*g) for g in self.groups)})
        _check_groups(graph)
        _check_runs(graph)
        _check_operations(graph)  # reads the axes
        if graph.fingerprint != self.fingerprint:
            raise PlanError(
                f"its fingerprint {shown(self.fingerprint)} is not that of its parameters, {graph.fingerprint}; {AGAIN}"
            )
        return graph


@dataclass(frozen=True)
class Document:
    """A plan's file; ``summary`` is there for people, and derived."""

    schema: int
    target: str
    method: str
    options: dict[str, Any]
    allocation: str
    importance: str
    summary: dict[str, Any]
    latency: Pace | None
    groups: tuple[GroupEntry, ...]
    layers: tuple[LayerEntry, ...]
    network: NetworkEntry

    @classmethod
    def read(cls, text: str) -> Document:
        """Read a file's text.

        Raises:
            PlanError: If it is no plan, or of a later schema; names the first field that is wrong.
        """
        if len(text) > LONGEST:
            raise PlanError(f"the plan has {len(text)} characters; a plan has at most {LONGEST}: {AGAIN}")
        try:
            data = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is no JSON ({error}); write one with `dyncompress plan` or Plan.save") from None
        if not isinstance(data, dict) or "schema" not in data:
            raise PlanError("the JSON is no plan (it has no 'schema'); write one with `dyncompress plan` or Plan.save")
        schema = data["schema"]
        if type(schema) is not int or not 1 <= schema <= SCHEMA:
            later = "upgrade dyncompress, or " if type(schema) is int and schema > SCHEMA else ""
            raise PlanError(
                f"the plan has schema {shown(schema)}, this version reads {SCHEMA} and those before:"
                f" {later}make it again with `dyncompress plan`"
            )
        try:
            document: Document = typed(cls, _current(data))
        except (MistypedError, DynCompressError) as error:  # the latter of a convolution's shape
            raise PlanError(f"the plan is malformed: {error}; {AGAIN}") from None
        return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} is there twice")
        found[key] = value
    return found


def _current(data: dict[str, Any]) -> dict[str, Any]:
    """The same plan in today's schema.

    In schema 1 a network whose code counts channels had these channels pinned or put back (its seams), so no attribute
    counts; a convolution that ran several times could not become dynamic, so one that can ran once. Fields of before
    the last version of schema 1 have the values that they stood for.
    """
    data = {"importance": "magnitude", "latency": None} | data
    network = data.get("network")
    if data["schema"] != 1 or not isinstance(network, dict):
        return data
    operations = network.get("operations")
    if isinstance(operations, list):
        operations = [_current_operation(op) if isinstance(op, dict) else op for op in operations]
    empty: dict[str, Any] = {"counts": {}, "unseen": [], "rescaled": []}
    return data | {"network": empty | network | {"operations": operations}}


def _current_operation(op: dict[str, Any]) -> dict[str, Any]:
    once = [[op.get("positions"), 1]] if op.get("spec") is not None else []
    return {"norm": "", "static": "", "runs": once} | op


# ---- a graph against itself --------------------------------------------------------------------------------------


def _check_groups(graph: ConvGraph) -> None:
    named = [g.name for g in graph.groups]
    if len(set(named)) < len(named):
        raise PlanError(f"two of its groups have one name, among {shown(named)}; {AGAIN}")
    for group in graph.groups:
        if group.channels < 1:
            raise PlanError(f"group {shown(group.name)} has {group.channels} channels; a group has at least 1: {AGAIN}")
    total = sum(g.channels for g in graph.groups)
    if total > CHANNELS:
        raise PlanError(f"its groups have {total} channels; they have at most {CHANNELS} together: {AGAIN}")


def _check_operations(graph: ConvGraph) -> None:
    modules = [op.module for op in graph.convs]
    if len(set(modules)) < len(modules):
        raise PlanError(f"one of its convolutions is there twice, among {shown(modules)}; {AGAIN}")
    for op in graph.operations:
        groups = [group for _, parts in op.axes for group, _ in parts]
        numbers = [op.fixed, op.positions, *(n for fixed, parts in op.axes for n in (fixed, *(e for _, e in parts)))]
        if min(numbers) < 0 or any(not 0 <= g < len(graph.groups) for g in groups):
            raise PlanError(
                f"the cost of {shown(op.module)} has a negative number, or a group that is not there"
                f" (0 to {len(graph.groups) - 1}); {AGAIN}"
            )
        if op.spec is None:
            continue
        expected = op.spec.weight_shape[:2] if op.kind == "linear" else op.spec.weight_shape
        shape = graph.parameters.get(op.weight, expected)  # the weight may be a buffer
        fits = op.kind == "conv" or (op.kind == "linear" and op.spec.ndim == 1 and op.spec.is_pointwise)
        if not fits or op.weight != f"{op.module}.weight" or shape != expected:
            raise PlanError(
                f"{shown(op.module)} is a {op.kind} {op.spec} with weight {shown(op.weight)} of shape {shape}; a"
                f" convolution, or a linear layer that is a pointwise one, has its own, of shape {expected}: {AGAIN}"
            )
        if op.positions < 1 or not op.runs or min(n for run in op.runs for n in run) < 1:
            raise PlanError(
                f"{shown(op.module)} ran on {op.positions} positions and {shown(op.runs)}; it has at least one run, of"
                f" at least 1 position and 1 image: {AGAIN}"
            )
        bias = f"{op.module}.bias"
        if bias in graph.parameters and graph.axes.get(f"{bias}:0") != graph.axes.get(f"{op.weight}:0"):
            raise PlanError(f"the bias of {shown(op.module)} has other channels than its weight writes; {AGAIN}")
        positions, images = op.runs[0]
        for keep in (widths(graph), [1] * len(graph.groups)):  # an axis that is lost shows where groups are narrow
            macs = operation_macs(op, keep)
            if positions != op.positions or macs != narrow_spec(graph, op, keep).kernel_params * positions * images:
                raise PlanError(
                    f"{shown(op.module)} ({op.spec}) ran first on {shown(op.runs[0])} positions and images, and costs"
                    f" {macs} MACs on {op.positions} positions: this and the axes of its weight don't agree; {AGAIN}"
                )


def _check_runs(graph: ConvGraph) -> None:
    if any(size < 0 for shape in graph.parameters.values() for size in shape):
        raise PlanError(f"a parameter has a negative size; {AGAIN}")
    for key, runs in graph.axes.items():
        name, _, dim = key.rpartition(":")
        _check_axis(graph, f"axis {shown(key)}", runs)
        shape = graph.parameters.get(name)  # a buffer's is not known here; `convert` checks it
        if not dim.isdecimal() or len(dim) > 2 or (shape is not None and int(dim) >= len(shape)):
            raise PlanError(f"axis {shown(key)} is no dimension of {shown(name)}, of shape {shape}; {AGAIN}")
        if shape is not None and length(runs) != shape[int(dim)]:
            raise PlanError(f"axis {shown(key)} has {length(runs)} channels, its tensor {shape[int(dim)]}; {AGAIN}")
    for key, runs in graph.counts.items():
        _check_axis(graph, f"count {shown(key)}", runs)
        if not _COUNT.fullmatch(key):
            raise PlanError(f"count {shown(key)} names no attribute; it takes 'module:attribute[:index]': {AGAIN}")
    for key, (entering, leaving) in graph.seams.items():
        if not key:
            raise PlanError(f"a seam has no module; it takes the path of one below the network: {AGAIN}")
        for runs in (entering, leaving):
            _check_axis(graph, f"seam {shown(key)}", runs)
            if length(runs) > PASSING:
                raise PlanError(f"seam {shown(key)} has {length(runs)} channels; at most {PASSING} pass one: {AGAIN}")


def _check_axis(graph: ConvGraph, what: str, runs: Runs) -> None:
    for group, start, count, repeat in runs:
        inside = group < 0 or (group < len(graph.groups) and start + count <= graph.groups[group].channels)
        if not inside or start < 0 or count < 1 or repeat < 1:
            have = [g.channels for g in graph.groups]
            raise PlanError(
                f"{what} has the run {(group, start, count, repeat)}, outside its group (channels per group:"
                f" {shown(have)}); {AGAIN}"
            )


# ---- channels that stay ------------------------------------------------------------------------------------------


def ranges(kept: Sequence[int]) -> str:
    """Channel numbers as text: (0, 1, 2, 5) is '0-2,5'."""
    parts: list[list[int]] = []
    for c in kept:
        if parts and parts[-1][1] == c - 1:
            parts[-1][1] = c
        else:
            parts.append([c, c])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def kept(groups: Iterable[Group], entries: Sequence[GroupEntry]) -> tuple[Keep, ...]:
    """What each group keeps, as numbers.

    Raises:
        PlanError: If the entries are of other groups, or one keeps what its group does not have.
    """
    groups = list(groups)
    if [(e.name, e.channels) for e in entries] != [(g.name, g.channels) for g in groups]:
        raise PlanError(
            f"the plan is malformed: its groups are {shown([e.name for e in entries])}, those of its network"
            f" {shown([g.name for g in groups])}, with the same numbers of channels; {AGAIN}"
        )
    return tuple(_keep(g, e.keep) for g, e in zip(groups, entries, strict=True))


def _keep(group: Group, keep: int | str) -> Keep:
    if isinstance(keep, int):
        if not 1 <= keep <= group.channels:
            raise PlanError(f"group '{group.name}' keeps {keep} channels; keep 1 to {group.channels}")
        return keep
    if len(keep) > 20 * group.channels + 20 or not _SPANS.fullmatch(keep):
        raise PlanError(
            f"group '{group.name}' keeps {shown(keep)}; give a number of channels, or which (each once) as text, such"
            " as '0-7,12'"
        )
    spans = sorted((int(part.split("-")[0]), int(part.split("-")[-1])) for part in keep.split(","))
    if any(not 0 <= a <= b < group.channels for a, b in spans):
        raise PlanError(f"group '{group.name}' keeps channels {shown(keep)}; it has 0 to {group.channels - 1}")
    if any(b >= c for (_, b), (c, _) in pairwise(spans)):
        raise PlanError(f"group '{group.name}' keeps channels {shown(keep)}, some of them twice; name each once")
    return tuple(c for a, b in spans for c in range(a, b + 1))


def network_entry(graph: ConvGraph) -> dict[str, Any]:
    """The graph in plain types, one line's worth per entry."""
    return {
        "fingerprint": graph.fingerprint,
        "operations": [dataclasses.asdict(op) for op in graph.operations],
        "groups": [[g.name, g.channels] for g in graph.groups],
        "axes": graph.axes,
        "seams": graph.seams,
        "counts": graph.counts,
        "unseen": graph.unseen,
        "rescaled": graph.rescaled,
        "parameters": graph.parameters,
    }
