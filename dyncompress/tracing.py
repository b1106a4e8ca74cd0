"""Find the channel graph of a network.

`trace` runs the network on an example, follows the channel labels (`propagation.py`), closes the ties into width
groups, and verifies them: it cuts a copy and runs it under its labels (`audit.py`). Where the code can't follow,
another way to cut is taken (`sites.py`), and after the last one the channels are pinned, with the reason.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyncompress.audit import Audit, AuditedRun, Finding, ZeroedRun
from dyncompress.errors import TraceError
from dyncompress.graph import (
    ConvGraph,
    Group,
    Operation,
    as_call,
    bare,
    duplicate,
    extent,
    one_image,
    parameter_shapes,
    tensors_in,
    undisturbed,
)
from dyncompress.layers import ConvSpec
from dyncompress.narrowing import Runs, cut, encode, positions
from dyncompress.propagation import Axis, Propagation, Recording
from dyncompress.rules import rule_for
from dyncompress.sites import Line

ROUNDS = 60
"""Findings after which the groups that still fail are found one by one."""

TOLERANCE = 1e-3
"""Difference of a cut network's output from what is expected, relative to its largest value."""

TRIES = 12
"""Other ways to cut that are tried for one finding."""


def trace(net: nn.Module, example: Any) -> ConvGraph:
    """Find the convolutions of a network and the groups of channels that must be cut together.

    The network is left as it was: a copy runs, in eval mode, on one image. Where that leaves modules out (auxiliary
    heads), the copy runs in training mode as well.

    Args:
        net: Any network.
        example: What its ``forward`` takes: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Returns:
        The channel graph, verified by running cut copies.

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
    net = bare(net)
    tracer = _Tracer(net, example)
    return tracer.graph()


def _training(net: nn.Module, training: bool) -> nn.Module:
    """Set a network's mode; its BatchNorms stay in eval mode, for one image has no statistics."""
    net.train(training)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.eval()
    return net


@dataclass
class _Closed:
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


class _Tracer:
    """One network on its way to a verified graph."""

    def __init__(self, net: nn.Module, example: Any) -> None:
        self.name = type(net).__name__
        self.args, self.kwargs = as_call(one_image(example))
        self.net = duplicate(net, share=True).eval()
        self.decisions: dict[Line, int] = {}  # places where the first way failed
        self.pins: list[tuple[Axis, np.ndarray, str]] = []  # positions of axes that proved uncuttable
        self.in_training: bool | None = None  # whether modules run in training only; unknown yet
        self._record()

    # ---- the recorded run ----------------------------------------------------------------------------------------

    def _record(self) -> None:
        mode = Propagation(self.net, rule_for, decisions=self.decisions)
        self.expected = []
        try:
            with undisturbed():
                self.expected.append(self._propagate(mode, training=False))
                if self.in_training is None:
                    self.in_training = bool(self._unseen(mode.recording))
                if self.in_training:
                    mode.costing = False
                    self.expected += self._propagate_training(mode)
        finally:
            mode.close()
        self.recording, self._recorded = mode.recording, dict(self.decisions)
        if not any(op.kind.startswith("conv") for op in mode.recording.operations):
            raise TraceError(f"{self.name} runs no convolution on the example; dyncompress compresses convolutions")

    def _propagate(self, mode: Propagation, training: bool) -> list[tuple[int, ...]]:
        _training(self.net, training)
        try:
            with mode:
                output = self.net(*self.args, **self.kwargs)
        except Exception as error:
            raise self._diagnosis(error) from error
        found = tensors_in(output)
        mode.pin(found, "output of the network")
        return [tuple(t.shape) for t in found]

    def _diagnosis(self, error: Exception) -> TraceError:
        """Whose fault it is that the network does not run."""
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in((self.args, self.kwargs))) or "no tensors"
        try:
            self.net(*self.args, **self.kwargs)
        except Exception as own:  # noqa: BLE001 - told below
            return TraceError(
                f"{self.name} fails on the example ({shapes}): {own}; pass an example that its forward takes"
                " (a tensor, a tuple of arguments or a dict of keyword arguments)"
            )
        return TraceError(
            f"{self.name} runs on the example ({shapes}), but not while its operations are followed: {error};"
            " pass the network without compilers, scripts and wrappers around it"
        )

    def _propagate_training(self, mode: Propagation) -> list[list[tuple[int, ...]]]:
        """What runs in training only; a network that asks for labels there, or for more images, goes without."""
        try:
            shapes = self._propagate(mode, training=True)
        except TraceError:
            self.in_training = False
            return []
        return [shapes]

    def _unseen(self, recording: Recording) -> list[str]:
        return [
            name for name, m in self.net.named_modules() if not recording.calls[name] and list(m.parameters(False))
        ]

    # ---- the graph -----------------------------------------------------------------------------------------------

    def graph(self) -> ConvGraph:
        """The channel graph: as free as verification lets it be."""
        closed, graph = self._build()
        findings = self._audit(closed, graph)
        for _ in range(ROUNDS):
            if not findings:
                return graph
            closed, graph, findings = self._mend(closed, graph, findings[0])
        while broken := self._broken(closed, graph):
            self._pin_groups(closed, broken)
            closed, graph = self._build()
        return graph

    def _mend(
        self, closed: _Closed, graph: ConvGraph, finding: Finding
    ) -> tuple[_Closed, ConvGraph, list[Finding]]:
        """Get past a finding: by another way at one of the suspected places, else by pinning what it found."""
        before = dict(self.decisions)
        for update in self._suspects(closed, finding):
            self.decisions = before | update
            self._record()
            built = self._build()
            findings = self._audit(*built)
            if not findings or sys.maxsize > findings[0].progress > finding.progress:
                return *built, findings
        if self.decisions != before:
            self.decisions = before
            self._record()
        near, far = closed.groups(finding.labels), closed.groups(finding.nearby)
        self._pin_groups(closed, dict.fromkeys(near or far, finding.reason) or self._broken(closed, graph))
        built = self._build()
        return *built, self._audit(*built)

    def _build(self) -> tuple[_Closed, ConvGraph]:
        recording = self.recording
        ledger = recording.ledger.copy()
        for axis, where, reason in self.pins:
            ledger.pin(recording.axes[axis][torch.from_numpy(where)], reason)
        classes, pinned = ledger.classes()
        counts = self._counts()
        closed = _Closed(classes, pinned, _members(recording, classes, pinned, [ids for _, ids in counts]))
        axes = {f"{name}:{dim}": closed.runs(ids) for (name, dim), ids in recording.axes.items()}
        axes = {key: r for key, r in axes.items() if any(group >= 0 for group, *_ in r)}
        operations = tuple(self._operation(closed, op) for op in recording.operations)
        seams = {name: (closed.runs(s.entering), closed.runs(s.leaving)) for name, s in recording.seams.items()}
        graph = ConvGraph(
            operations,
            _named(closed.members, operations),
            axes,
            seams,
            parameter_shapes(self.net),
            _agreed((key, closed.runs(ids)) for key, ids in counts),
            tuple(self._unseen(recording)),
            tuple(dict.fromkeys(reason for ids, reason in recording.rescaled if closed.groups(ids.numpy()))),
        )
        return closed, graph

    def _counts(self) -> list[tuple[str, Tensor]]:
        """Attributes that count channels, as far as the ways that are taken use them."""
        return [
            (c.attribute.key, c.labels) for site in self.recording.sites if site.way is not None for c in site.way.counts
        ]

    def _operation(self, closed: _Closed, op: Any) -> Operation:
        recording = self.recording
        own = closed.classes[op.writes.numpy()].tolist() if op.writes is not None else []
        kept = all(c not in closed.place for c in own)
        reason = next((closed.pinned[c] for c in own if c in closed.pinned), "") if kept else ""
        spec, block, norm = _replaceable(self.net, recording, op.module, op.weight), "", ""
        if spec is not None:
            inside = [b for b in recording.residual_modules if b and op.module.startswith(b + ".")]
            block, norm = max(inside, key=len, default=""), recording.norms.get(op.module, "")
        extents = tuple(extent(closed.runs(ids)) for ids in op.axes)
        return Operation(op.module, op.kind, op.weight, op.fixed, extents, op.positions, spec, block, norm, reason)

    # ---- verification --------------------------------------------------------------------------------------------

    def _audit(self, closed: _Closed, graph: ConvGraph, only: Sequence[int] | None = None) -> list[Finding]:
        """Cut these groups out of a copy, run it, and see whether every channel is where the graph says."""
        groups = range(len(graph.groups)) if only is None else only
        if not groups:
            return []
        kept = [_sample(g.channels, i) if i in groups else range(g.channels) for i, g in enumerate(graph.groups)]
        trial = duplicate(self.net, share=True)
        cut(trial, graph, kept)
        axes = {
            (name, dim): ids[positions(runs, kept)] if (runs := graph.axes.get(f"{name}:{dim}")) else ids
            for (name, dim), ids in self.recording.axes.items()
        }
        seams = {n: s.leaving[positions(graph.seams[n][1], kept)] for n, s in self.recording.seams.items()}
        run = AuditedRun(trial, Audit(closed.classes, closed.pinned), axes, seams, self.recording.taken)
        try:
            for training, expected in zip((False, True), self.expected, strict=False):
                _training(trial, training)
                try:
                    with undisturbed(), run:
                        output = trial(*self.args, **self.kwargs)
                except Exception as error:  # noqa: BLE001 - whatever the network's own code raises is the finding
                    return [*run.findings, run.failure(error)]
                found = [tuple(t.shape) for t in tensors_in(output)]
                if found != expected and not run.findings:
                    nothing = np.zeros(0, dtype=np.int64)
                    reason = f"cutting it changes the output's shape from {expected} to {found}"
                    run.findings.append(Finding(reason, "", sys.maxsize, sys.maxsize, nothing, nothing))
                if not training and not run.findings and not graph.rescaled:
                    run.findings += self._compare(closed, kept, tensors_in(output))
        finally:
            run.close()
        return run.findings

    def _compare(self, closed: _Closed, kept: Sequence[Sequence[int]], found: Sequence[Tensor]) -> list[Finding]:
        """Does the cut network compute what the original computes when nothing reads the cut channels?"""
        stays = torch.ones(len(closed.classes), dtype=torch.bool)
        for g, members in enumerate(closed.members):
            gone = sorted(set(range(len(members))) - set(kept[g]))
            stays[torch.from_numpy(np.isin(closed.classes, [members[i] for i in gone]))] = False
        _training(self.net, training=False)
        run = ZeroedRun(self.net, self.decisions, stays)
        try:
            with undisturbed(), run:
                expected = tensors_in(self.net(*self.args, **self.kwargs))
        finally:
            run.close()
        for a, b in zip(found, expected, strict=True):
            scale = b.abs().max().item() if b.is_floating_point() and b.numel() else math.nan
            if math.isfinite(scale) and (a - b).abs().max().item() > TOLERANCE * max(scale, 1e-6):
                nothing = np.zeros(0, dtype=np.int64)
                reason = "the cut network doesn't compute what the original does without the cut channels"
                return [Finding(reason, "", sys.maxsize, sys.maxsize, nothing, nothing)]
        return []

    def _suspects(self, closed: _Closed, finding: Finding) -> list[dict[Line, int]]:
        """Other ways at the places that a finding may stem from: those that its channels passed last go first."""
        groups = closed.groups(finding.labels) | closed.groups(finding.nearby)
        passed = [s for s in self.recording.sites[: finding.places + 1] if s.way is not None]
        cuttable = [(s, closed.groups(s.labels.numpy())) for s in passed]
        touching = [s for s, found in cuttable if found & groups]
        if not touching:  # only the place tells, or only the result
            anywhere = finding.progress == sys.maxsize
            touching = [s for s, found in cuttable if found and (anywhere or s.module == finding.module)]
        ordered = sorted(reversed(touching), key=lambda s: s.module != finding.module)
        tries = [{s.line: way} for s in ordered for way in s.others]
        together = {s.line: s.unpatched for s in ordered if s.way is not None and s.way.counts}
        unique = {tuple(t.items()): t for t in ([together] if together else []) + tries}
        return list(unique.values())[:TRIES]

    def _pin_groups(self, closed: _Closed, broken: Mapping[int, str]) -> None:
        for group, reason in broken.items():
            for axis, labels in self.recording.axes.items():
                where = np.nonzero(np.isin(closed.classes[labels.numpy()], closed.members[group]))[0]
                if where.size:
                    self.pins.append((axis, where, reason))

    def _broken(self, closed: _Closed, graph: ConvGraph) -> dict[int, str]:
        """Groups that fail, found by halving the suspects."""
        broken: dict[int, str] = {}

        def search(groups: Sequence[int]) -> None:
            found = self._audit(closed, graph, [g for g in groups if g not in broken])
            if not found:
                return
            if len(groups) == 1:
                broken[groups[0]] = found[0].reason
                return
            middle, before = len(groups) // 2, len(broken)
            search(groups[:middle])
            search(groups[middle:])
            if len(broken) == before:  # each half runs alone, but not both
                broken.update(dict.fromkeys(groups, found[0].reason))

        search(range(len(graph.groups)))
        return broken


def _sample(channels: int, group: int) -> list[int]:
    """About two thirds of the channels, at irregular places: a shifted channel shows."""
    kept = [i for i in range(channels) if (i + group) % 3 != 1]
    return kept if len(kept) < channels else kept[1:]


def _members(
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
    return [members for members in groups.values() if len(members) > 1]


def _agreed(counts: Any) -> dict[str, Runs]:
    """Attributes that count the channels of a group; one that would have to count two different things is left."""
    found: dict[str, set[Runs]] = defaultdict(set)
    for key, runs in counts:
        found[key].add(runs)
    return {
        key: next(iter(several))
        for key, several in found.items()
        if len(several) == 1 and any(group >= 0 for runs in several for group, *_ in runs)
    }


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
