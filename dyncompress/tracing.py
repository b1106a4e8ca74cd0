"""Find the channel graph of a network.

`trace` runs the network on an example, follows the channel labels (`propagation.py`), closes the ties into width
groups, and verifies them: it cuts a copy and runs it under its labels (`audit.py`). Where the code can't follow,
another way to cut is taken (`sites.py`), and after the last one the channels are pinned, with the reason.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyncompress.audit import Audit, AuditedRun, Finding, ZeroedRun
from dyncompress.errors import TraceError
from dyncompress.graph import (
    ConvGraph,
    as_call,
    bare,
    duplicate,
    one_image,
    parameter_shapes,
    tensors_in,
    undisturbed,
)
from dyncompress.grouping import Closed, agreed, members, named, operations, replaceable
from dyncompress.narrowing import cut, positions
from dyncompress.propagation import Propagation
from dyncompress.recording import Axis, Recording
from dyncompress.rules import rule_for
from dyncompress.sites import Line
from dyncompress.standins import missed

ROUNDS = 60
"""Findings after which the groups that still fail are found one by one."""

TOLERANCE = 1e-4
"""Difference of a cut network's output from what is expected, relative to its largest value."""

TRIES = 12
"""Other ways to cut that are tried for one finding."""

TRIES_IN_ALL = 60
"""After as many, a finding's channels are pinned without trying."""

Kept = Callable[[ConvGraph], Sequence[Sequence[int]]]
"""Which channels of each width group a cut copy keeps."""


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
    return Tracer(net, example).graph


def _training(net: nn.Module, training: bool) -> nn.Module:
    """Set a network's mode; its BatchNorms stay in eval mode, for one image has no statistics."""
    net.train(training)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.eval()
    return net


class Tracer:
    """A network and its channel graph, which is verified again for the widths that a plan arrives at.

    Args:
        net: The network; left as it was.
        example: As for `trace`.
        linear: Whether linear layers are among the operations that a method can replace.

    Raises:
        TraceError: As `trace`.

    Attributes:
        graph: The channel graph.
    """

    def __init__(self, net: nn.Module, example: Any, *, linear: bool = False) -> None:
        if not isinstance(net, nn.Module):
            raise TraceError(f"can't trace a {type(net).__name__}; pass a torch.nn.Module")
        net = bare(net)
        if isinstance(net, torch.jit.ScriptModule):
            raise TraceError(
                f"can't trace a scripted {net.original_name}; pass the torch.nn.Module that it was made from"
            )
        self.name, self.linear = type(net).__name__, linear
        self.args, self.kwargs = as_call(one_image(example))
        self.net = duplicate(net).eval()  # not shared: a forward may write into its weights
        self.decisions: dict[Line, int] = {}  # places where the first way failed
        self.tries = 0
        self.pins: list[tuple[Axis, np.ndarray, str]] = []  # positions of axes that proved uncuttable
        self.in_training: bool | None = None  # whether modules run in training only; unknown yet
        self._record()
        layers = replaceable(self.net, self.recording, linear)
        self._missed = missed(_training(self.net, False), layers, self.args, self.kwargs)
        self._closed, self.graph = self._build()
        self._verify(lambda graph: [_sample(g.channels, i) for i, g in enumerate(graph.groups)])

    # ---- the recorded run ----------------------------------------------------------------------------------------

    def _record(self) -> None:
        mode = Propagation(self.net, rule_for, decisions=self.decisions)
        self.expected = []
        try:
            with undisturbed():
                self.expected.append(self._propagate(mode, training=False))
                if self.in_training is None:
                    used = {name for name, _ in mode.recording.axes}
                    self.in_training = any(p.numel() > 1 and n not in used for n, p in self.net.named_parameters())
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
        used = {name for name, _ in recording.axes}
        return [
            path
            for path, module in self.net.named_modules()
            if not recording.calls[path] and (own := [n for n, _ in module.named_parameters(path, recurse=False)])
            if not used & set(own)
        ]

    # ---- the graph -----------------------------------------------------------------------------------------------

    def follows(self, keep: Sequence[int | Sequence[int]]) -> bool:
        """Whether the network runs when its width groups keep these channels; if not, the graph becomes one it follows.

        Args:
            keep: Per group, how many channels stay, or which.
        """
        widths = {g.name: k for g, k in zip(self.graph.groups, keep, strict=True)}
        before = self.graph

        def kept(graph: ConvGraph) -> list[Sequence[int]]:
            found: list[Sequence[int]] = []
            for i, g in enumerate(graph.groups):
                k = widths.get(g.name, g.channels)
                named = not isinstance(k, int) and max(k) < g.channels  # else a group of that name has changed
                found.append(k if named else _sample(g.channels, i, k if isinstance(k, int) else len(k)))  # type: ignore[arg-type]
            return found

        self._verify(kept)
        return self.graph == before  # by value: a search that changed nothing must not ask for another plan

    def _verify(self, kept: Kept) -> None:
        """Cut copies until one runs as the graph says: as free as the network's code lets it be."""
        self._kept = kept
        findings = self._audit()
        for _ in range(ROUNDS):
            if not findings:
                return
            findings = self._mend(findings[0])
        while broken := self._broken():
            self._pin(broken)

    def _mend(self, finding: Finding) -> list[Finding]:
        """Get past a finding: by another way at one of the suspected places, else by pinning what it found."""
        before, built = dict(self.decisions), (self._closed, self.graph)
        for update in self._suspects(finding) if self.tries < TRIES_IN_ALL else ():
            self.tries += 1
            self.decisions = before | update
            self._record()
            self._closed, self.graph = self._build()
            findings = self._audit()
            if not findings or sys.maxsize > findings[0].progress > finding.progress:
                return findings
        if self.decisions != before:
            self.decisions = before
            self._record()
        self._closed, self.graph = built
        near, far = self._closed.groups(finding.labels), self._closed.groups(finding.nearby)
        self._pin(dict.fromkeys(near or far, finding.reason) or self._broken())
        return self._audit()

    def _build(self) -> tuple[Closed, ConvGraph]:
        recording = self.recording
        ledger = recording.ledger.copy()
        for axis, where, reason in self.pins:
            ledger.pin(recording.axes[axis][torch.from_numpy(where)], reason)
        classes, pinned = ledger.classes()
        counts = self._counts()
        closed = Closed(classes, pinned, members(recording, classes, pinned, [ids for _, ids in counts]))
        axes = {f"{name}:{dim}": closed.runs(ids) for (name, dim), ids in recording.axes.items()}
        axes = {key: r for key, r in axes.items() if any(group >= 0 for group, *_ in r)}
        ops = operations(self.net, recording, closed, self._missed, self.linear)
        seams = {name: (closed.runs(s.entering), closed.runs(s.leaving)) for name, s in recording.seams.items()}
        graph = ConvGraph(
            ops,
            named(closed.members, ops),
            axes,
            seams,
            parameter_shapes(self.net),
            agreed((key, closed.runs(ids)) for key, ids in counts),
            tuple(self._unseen(recording)),
            tuple(dict.fromkeys(reason for ids, reason in recording.rescaled if closed.groups(ids.numpy()))),
        )
        return closed, graph

    def _counts(self) -> list[tuple[str, Tensor]]:
        """Attributes that count channels, as far as the ways that are taken use them."""
        return [
            (c.attribute.key, c.labels)
            for site in self.recording.sites
            if site.way is not None
            for c in site.way.counts
        ]

    # ---- verification --------------------------------------------------------------------------------------------

    def _audit(self, only: Sequence[int] | None = None) -> list[Finding]:
        """Cut these groups out of a copy, run it, and see whether every channel is where the graph says."""
        closed, graph = self._closed, self.graph
        groups = range(len(graph.groups)) if only is None else only
        if not groups:
            return []
        full = [range(g.channels) for g in graph.groups]
        kept = [k if i in groups else full[i] for i, k in enumerate(self._kept(graph))]
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
                if not graph.rescaled and not training and not run.findings:
                    run.findings += self._compare(closed, kept, tensors_in(output))
        finally:
            run.close()
        return run.findings

    def _compare(self, closed: Closed, kept: Sequence[Sequence[int]], found: Sequence[Tensor]) -> list[Finding]:
        """Does the cut network compute what the original computes when nothing reads the cut channels?"""
        stays = torch.ones(len(closed.classes), dtype=torch.bool)
        for group, stay in zip(closed.members, kept, strict=True):
            gone = [group[i] for i in sorted(set(range(len(group))) - set(stay))]
            stays[torch.from_numpy(np.isin(closed.classes, gone))] = False
        _training(self.net, training=False)
        with undisturbed(), ZeroedRun(self.recording.consumed, stays):
            expected = tensors_in(self.net(*self.args, **self.kwargs))
        for a, b in zip(found, expected, strict=True):
            scale = b.abs().max().item() if b.is_floating_point() and b.numel() else math.nan
            if math.isfinite(scale) and (a - b).abs().max().item() > TOLERANCE * max(scale, 1e-6):
                nothing = np.zeros(0, dtype=np.int64)
                reason = "the cut network doesn't compute what the original does without the cut channels"
                return [Finding(reason, "", sys.maxsize, sys.maxsize, nothing, nothing)]
        return []

    def _suspects(self, finding: Finding) -> list[dict[Line, int]]:
        """Other ways at the places that a finding may stem from: those that its channels passed last go first."""
        closed = self._closed
        groups = closed.groups(finding.labels) | closed.groups(finding.nearby)
        if finding.progress == sys.maxsize:  # only the result tells
            groups = set(range(len(closed.members)))
        passed = [s for s in self.recording.sites[: finding.places + 1] if s.way is not None]
        cuttable = [(s, closed.groups(s.labels.numpy())) for s in passed]
        touching = [s for s, found in cuttable if found & groups]
        if not touching:  # only the place tells, or only the result
            anywhere = finding.progress == sys.maxsize
            touching = [s for s, found in cuttable if found and (anywhere or s.module == finding.module)]
        ordered = sorted(reversed(touching), key=lambda s: s.module != finding.module)
        tries = [{s.line: s.unpatched for s in ordered if s.way is not None and s.way.counts}]
        if ordered:
            alike = [s for s in ordered if s.line[:2] == ordered[0].line[:2]]  # the same code runs in turn
            tries += [{s.line: way for s in alike if way < len(s.ways)} for way in ordered[0].others[:-1]]
        tries += [{s.line: way} for s in ordered for way in s.others[:-1]]
        tries += [{s.line: len(s.ways)} for s in ordered]
        unique = {tuple(t.items()): t for t in tries if t}
        return list(unique.values())[:TRIES]

    def _pin(self, broken: Mapping[int, str]) -> None:
        for group, reason in broken.items():
            for axis, labels in self.recording.axes.items():
                where = np.nonzero(np.isin(self._closed.classes[labels.numpy()], self._closed.members[group]))[0]
                if where.size:
                    self.pins.append((axis, where, reason))
        self._closed, self.graph = self._build()

    def _broken(self) -> dict[int, str]:
        """Groups that fail, found by halving the suspects."""
        broken: dict[int, str] = {}

        def search(groups: Sequence[int]) -> None:
            found = self._audit([g for g in groups if g not in broken])
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

        search(range(len(self.graph.groups)))
        return broken


def _sample(channels: int, group: int, count: int = 0) -> list[int]:
    """Some of the channels, at irregular places: a shifted channel shows.

    Unless a count is given, groups of one size keep different numbers: code that takes one width for another's shows.
    """
    count = count or max(1, channels - 1 - (2 * channels // 5 + 3 * group) % max(1, 2 * channels // 3))
    return sorted(np.random.RandomState(group).permutation(channels)[:count].tolist())
