"""What a network's score loses when one width group is cut: measured once, kept on disk, used by many plans.

`measure` cuts one group at a time, to a few widths, and asks for the score. Between measured widths a drop is
interpolated, and a narrower group never counts as a smaller drop. `make_plan(..., allocation="sensitivity")` then
chooses the widths whose drops sum to the least. That they add up is an approximation: it ranks groups, it does not
predict the student's score.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dyncompress import files
from dyncompress.allocation import near
from dyncompress.conversion import narrowed, plan_of
from dyncompress.cost import static_choices, widths
from dyncompress.distillation import fingerprint
from dyncompress.errors import PlanError
from dyncompress.graph import ConvGraph, bare
from dyncompress.layers import Static
from dyncompress.plan import Plan
from dyncompress.ranking import rank
from dyncompress.taylor import Loss
from dyncompress.tracing import trace

SCHEMA = 1
Score = Callable[[nn.Module], float]
Progress = Callable[[int, int, str], None]

_EVEN = 0.01
"""Weight of even and aligned widths beside the largest drop: they decide among groups that lose about equally much."""


@dataclass(frozen=True)
class Sensitivity:
    """Scores of a network with one group cut at a time.

    Attributes:
        fingerprint: Of the network's names and shapes, as a plan has it.
        baseline: Score of the network as it is.
        scores: Group name -> channels kept -> score.
        score: What the score is called.
    """

    fingerprint: str
    baseline: float
    scores: Mapping[str, Mapping[int, float]]
    score: str = "score"

    def drops(self, group: str, channels: int) -> np.ndarray:
        """Score lost when a group keeps 0, 1, 2 ... all of its channels: falling with the width, 0 at the last.

        Linear between what was measured, with the running maximum towards narrower widths: a narrower group never
        counts as a smaller drop. Below the narrowest it goes on along the last line, or along that from the whole
        group where it is steeper: a plateau is no promise beyond its end.

        Example:
            >>> found = Sensitivity("", 0.9, {"conv1": {8: 0.8, 4: 0.5}})
            >>> found.drops("conv1", 16)[[16, 12, 8, 6, 4, 3]].round(3).tolist()
            [0.0, 0.05, 0.1, 0.25, 0.4, 0.475]
        """
        measured = sorted(((w, self.baseline - s) for w, s in self.scores[group].items() if w < channels), reverse=True)
        kept = np.array([channels, *(w for w, _ in measured)], float)
        lost = np.maximum.accumulate([0.0, *(drop for _, drop in measured)])
        found = np.interp(np.arange(channels + 1), kept[::-1], lost[::-1])
        if len(kept) > 1:
            slope = max((lost[-1] - lost[-2]) / (kept[-2] - kept[-1]), lost[-1] / (channels - kept[-1]))
            below = np.arange(int(kept[-1]))
            found[below] = lost[-1] + slope * (kept[-1] - below)
        return found

    def losses(self, graph: ConvGraph, each: Sequence[int]) -> list[np.ndarray]:
        """What every width of every group loses, for `allocation.allocate`.

        Args:
            graph: Channel graph of the network.
            each: Channels of a layer per channel of its group, for alignment.

        Raises:
            PlanError: If the map is of another network, or lacks a group.
        """
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"the sensitivity map is of network {self.fingerprint}, this one is {graph.fingerprint}; measure it for"
                " this network with dyncompress.sensitivity.measure"
            )
        missing = [g.name for g in graph.groups if g.name not in self.scores]
        if missing:
            raise PlanError(f"the sensitivity map lacks group {missing[0]!r}; go on measuring with the same cache")
        full = widths(graph)
        drops = [self.drops(g.name, g.channels) for g in graph.groups]
        scale = _EVEN * (max((float(d[0]) for d in drops), default=0.0) or 1.0)
        return [drop + scale * even for drop, even in zip(drops, near(full, full, each), strict=True)]


def measure(
    net: nn.Module,
    example: Any,
    score: Score,
    *,
    name: str = "score",
    shares: Sequence[float] = (0.75, 0.5, 0.25),
    importance: str = "magnitude",
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure what the score loses when one group is cut at a time: ``groups * len(shares)`` scores, and one more.

    Args:
        net: The network; left as it is.
        example: What its ``forward`` takes, as for `make_plan`.
        score: Gives a network's score; higher is better. It gets a narrowed copy each time, without gradients.
        name: What the score is called. It tells maps in one cache apart, so say what it is of: ``"acc, val[:2048]"``.
        shares: Shares of a group's channels to keep.
        importance: Which channels go first, as for `make_plan`, with its ``batches`` and ``loss``.
        batches: For ``importance="taylor"``.
        loss: For ``importance="taylor"``.
        cache: Folder for the map, one JSON file per network, weights, score and ranking. Every score is written when
            it is there: a run that was cut short goes on where it stopped, a finished one is read.
        progress: Called with (scores that are there, scores in all, what comes next).

    Returns:
        The map.

    Raises:
        TraceError: If the network fails on the example.
        PlanError: If a share is out of range, the score isn't a finite number, or the cache can't be read.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> found = measure(net, torch.zeros(1, 3, 8, 8), lambda net: net[0].out_channels / 8, shares=[0.5])
        >>> found.baseline, found.scores
        (1.0, {'0': {4: 0.5}})
    """
    if plan_of(net) is not None:
        raise PlanError(f"{type(net).__name__} is converted already; measure the original network")
    if not shares or not all(0 < share < 1 for share in shares):
        raise PlanError(f"shares {list(shares)} are no parts of a group; give some between 0 and 1, such as 0.75, 0.5")
    graph = trace(net, example)
    ranking = rank(net, graph, importance, batches, loss)
    ranks = [np.argsort(-s, kind="stable").tolist() for s in ranking.scores]
    file = _File(cache, _key(bare(net), graph, name, ranks))
    wanted = [(g, w) for g, group in enumerate(graph.groups) for w in _widths(group.channels, shares)]
    total, done = len(wanted) + 1, 0

    def scored(what: str, of: Callable[[], nn.Module]) -> float:
        nonlocal done
        if what not in file.scores:
            if progress is not None:
                progress(done, total, what)
            with torch.no_grad():
                file.write(what, _number(score(of()), name))
        done += 1
        return file.scores[what]

    baseline = scored("original", lambda: narrowed(net, _plan(graph, ranks, -1, 0)))
    found: dict[str, dict[int, float]] = {group.name: {} for group in graph.groups}
    for g, w in wanted:
        group = graph.groups[g].name
        found[group][w] = scored(f"{group} @ {w}", lambda g=g, w=w: narrowed(net, _plan(graph, ranks, g, w)))  # type: ignore[misc]
    if progress is not None:
        progress(total, total, "")
    return Sensitivity(graph.fingerprint, baseline, found, name)


def _widths(channels: int, shares: Sequence[float]) -> list[int]:
    """Widths to measure, widest first."""
    found = {max(1, round(share * channels)) for share in shares}
    return sorted((w for w in found if w < channels), reverse=True)


def _plan(graph: ConvGraph, ranks: Sequence[Sequence[int]], group: int, width: int) -> Plan:
    """One group cut, the rest as it is, nothing dynamic."""
    keep = tuple(tuple(sorted(r[:width] if g == group else r)) for g, r in enumerate(ranks))
    return Plan(graph, keep, tuple(static_choices(graph, Static())), "static", {}, "100%", "sensitivity")


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"score {name!r} is {value!r}; it must be a finite number, higher for a better network")
    return number


def _key(net: nn.Module, graph: ConvGraph, name: str, ranks: Sequence[Sequence[int]]) -> dict[str, str]:
    order = hashlib.sha256(json.dumps(ranks).encode()).hexdigest()[:16]
    return {"network": graph.fingerprint, "weights": fingerprint(net), "ranking": order, "score": name}


class _File:
    """Scores on disk: one file per key, replaced as a whole with every score."""

    def __init__(self, folder: str | Path | None, key: Mapping[str, str]) -> None:
        self.key, self.scores = dict(key), {}  # type: dict[str, str], dict[str, float]
        digest = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]
        self.path = None if folder is None else Path(folder, f"sensitivity-{digest}.json")
        if self.path is not None and self.path.exists():
            try:
                data = json.loads(self.path.read_text("utf-8"))
                if data["schema"] != SCHEMA or data["key"] != self.key:
                    raise ValueError(f"schema {data['schema']!r}, this version writes {SCHEMA}")
                self.scores = {str(what): float(value) for what, value in data["scores"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PlanError(
                    f"the sensitivity map at '{self.path}' can't be read ({type(error).__name__}: {error}); delete it"
                    " to measure anew"
                ) from None

    def write(self, what: str, value: float) -> None:
        """Add a score."""
        self.scores[what] = value
        if self.path is None:
            return
        content = {"schema": SCHEMA, "key": self.key, "scores": self.scores}
        files.write_text(self.path, json.dumps(content, indent=1) + "\n")
