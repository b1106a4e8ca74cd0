"""The cheapest network whose score stays within a drop of the original's, found with short trainings.

A narrower network scores less: with that, bisection finds the place. The search halves the range of MACs that the
network can be brought to, in ratios: the next plan costs the geometric mean of the cheapest that was within the drop
and the dearest that was not. A score that is nearer to the limit than its noise is no answer, so that such a plan is
trained again with another seed, and the mean decides. The cheapest that seems good enough is likelier than others to
have been lucky: before it is the answer, it is trained with as many seeds as are allowed, and the search goes on above
it where the mean of them is not good enough.

Trainings are short, so that a probe scores less than the network will after the whole training: what is found errs on
the safe side. Every score is written as soon as it is there, and none is asked for twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from torch import nn

from dyncompress import files
from dyncompress.allowance import Drop, SearchConfig, finite
from dyncompress.budget import readable
from dyncompress.distillation import fingerprint
from dyncompress.errors import SearchError
from dyncompress.graph import bare
from dyncompress.plan import Plan
from dyncompress.planning import make_plan, reachable
from dyncompress.sensitivity import Progress

SCHEMA = 1
Train = Callable[[Plan, int, int], float]
"""``train(plan, epochs, seed)``: carry the plan out on the original, train it, give its score; higher is better."""

_RANGE = ("method", "options", "ignore", "static", "floors", "min_width")  # of make_plan, what `reachable` takes too


@dataclass(frozen=True)
class Probe:
    """A plan and the scores that it was trained to.

    Attributes:
        target: Asked part of the original's MACs, as text.
        macs: What it costs.
        ratio: That over the original's.
        scores: One per training.
        within: Whether their mean stays within the drop.
    """

    target: str
    macs: int
    ratio: float
    scores: tuple[float, ...]
    within: bool

    @property
    def score(self) -> float:
        """Mean of the scores."""
        return fmean(self.scores)


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        plan: Of the cheapest network within the drop; where there is none, of the widest there is.
        reached: Whether it is within the drop.
        why: What ended the search, as a sentence.
        probes: What was tried, in that order.
        baseline: Score of the original.
        drop: Allowed drop, in the score's unit.
    """

    plan: Plan
    reached: bool
    why: str
    probes: tuple[Probe, ...]
    baseline: float
    drop: float

    @property
    def trainings(self) -> int:
        """Trainings that the search rests on."""
        return sum(len(probe.scores) for probe in self.probes)

    def table(self) -> Table:
        """The probes as a table for a terminal, dearest first."""
        table = Table(
            title=f"score {self.baseline:.4g}, of which {self.drop:.4g} may be lost",
            caption=self.why,
            title_style="bold",
        )
        for column in ("asked", "MACs", "", "score", "drop", "trainings", "within"):
            table.add_column(column, justify="right")
        for p in sorted(self.probes, key=lambda p: -p.macs):
            table.add_row(
                p.target, readable(p.macs), f"{p.ratio:.2%}", f"{p.score:.4g}", f"{self.baseline - p.score:+.4g}",
                str(len(p.scores)), "yes" if p.within else "no",
            )  # fmt: skip
        return table

    def metrics(self) -> dict[str, float]:
        """The outcome by the names under which it is logged."""
        chosen = [p.score for p in self.probes if p.macs == self.plan.macs_after]
        drop = {"search/drop": self.baseline - chosen[-1]} if chosen else {}
        return {
            "search/macs": float(self.plan.macs_after),
            "search/ratio": self.plan.ratio,
            "search/score_original": self.baseline,
            "search/max_drop": self.drop,
            "search/trainings": float(self.trainings),
            "search/reached": float(self.reached),
            **drop,
        }

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the probes, for loggers that take tables."""
        rows: list[list[Any]] = [[p.target, p.macs, p.ratio, p.score, len(p.scores), p.within] for p in self.probes]
        return ["target", "macs", "ratio", "score", "trainings", "within"], rows


def cheapest(
    net: nn.Module,
    example: Any,
    train: Train,
    max_drop: float | str | Drop,
    *,
    baseline: float,
    config: SearchConfig | None = None,
    cache: str | Path | None = None,
    what: str = "",
    progress: Progress | None = None,
    **how: Any,
) -> Found:
    """Find the cheapest plan whose network, shortly trained, scores at most ``max_drop`` less than the original.

    Args:
        net: The original; left as it is.
        example: What its ``forward`` takes, as for `make_plan`.
        train: ``train(plan, epochs, seed)`` converts the original by the plan, trains it, and gives its score on
            validation data. The data must not be that of the final score: a search chooses by it.
        max_drop: See `Drop`.
        baseline: The original's score on the same data.
        config: How long to train, and when to stop.
        cache: Folder for the scores: a search that was cut short goes on where it stopped. None keeps none; the one of
            ``config`` is for those who call this.
        what: What else the scores depend on, data and optimizer say: tells searches in one folder apart.
        progress: Called with (trainings so far, trainings at most, what comes next).
        **how: Further arguments of `make_plan`: ``method``, ``options``, ``allocation="sensitivity"`` with its map, ...

    Returns:
        The plan and how it was found.

    Raises:
        SearchError: If the drop can't be understood, a score is no number, or no student is cheaper than the original.
    """
    config = config or SearchConfig()
    asked = Drop.alone(max_drop, **{key: how.get(key) for key in ("target", "preset", "table")})
    assert asked is not None
    drop = asked.of(finite(baseline, "of the original"))
    reach = reachable(net, example, **{key: value for key, value in how.items() if key in _RANGE})
    if reach.lowest >= reach.original:
        raise SearchError(f"no student is cheaper than the original: {reach}; free layers, or choose another method")
    named = {"network": fingerprint(bare(net)), "score": f"{config.score} {baseline:.4g}", "epochs": str(config.epochs)}
    file = _File(cache, named | {"training": what})
    noise = drop / 4 if config.noise is None else config.noise * drop / asked.value
    low, high = reach.lowest / reach.original, min(1.0, reach.highest / reach.original)
    bisection = _Bisection(low, high, config.tolerance)
    trials = _Trials(
        baseline - drop, noise, config, lambda key, seed, plan: file.score(key, seed, plan, train, config.epochs)
    )
    while True:
        share, best = bisection.next(), trials.cheapest
        done = share is None and (best is None or trials.confirmed(best))
        if done or trials.used >= config.trainings:
            break
        if share is not None:
            key = trials.add(share, make_plan(net, example, _percent(share), **how))
            trials.decide(key, progress)
            bisection.tell(share, trials.within(key))
        elif best is not None:  # cheapest of several that seemed good enough: likelier than others to have been lucky
            trials.once(best, progress)
            if not trials.within(best):
                bisection.retract(
                    max(trials.shares[best]), min((min(trials.shares[k]) for k in trials.good), default=high)
                )
    if progress is not None:
        progress(config.trainings, config.trainings, "")
    ended = (
        f"bounds are within {config.tolerance:.0%}" if done else f"{trials.used} trainings were allowed, and are over"
    )
    if best is not None:
        plan, count = trials.plans[best], len(trials.scores[best])
        why = f"{plan.ratio:.2%} of the MACs is the cheapest within the drop, on average of {count}; {ended}"
    else:
        plan = make_plan(net, example, _percent(high), **how)
        why = f"no student was within the drop, {ended}: this is the widest one, {plan.ratio:.2%} of the MACs"
        why += "; train longer (search.epochs), or allow more" if _digest(plan) in trials.plans else ", untried"
    return Found(plan, best is not None, why, trials.probes, baseline, drop)


@contextmanager
def told(console: Console, what: str) -> Iterator[Progress]:
    """A progress bar for a search, while the context lasts."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bar(*columns, TextColumn("{task.fields[at]}"), console=console, transient=True) as bar:
        task = bar.add_task(what, at="")
        yield lambda done, total, at: bar.update(task, completed=done, total=total, at=at)


class _Bisection:
    """Where to look next between two costs, of which the upper is taken to be within the drop and the lower not.

    Both are assumptions until they are tried, which is done at the end, and only where the search arrives at them.
    """

    def __init__(self, low: float, high: float, tolerance: float) -> None:
        self.low, self.high, self.tolerance, self.top = low, high, tolerance, high
        self.tried_low = self.tried_high = False

    def next(self) -> float | None:
        """The next cost to try; None when the search is over."""
        if self.high > self.low * (1 + self.tolerance):
            return math.sqrt(self.low * self.high)
        if not self.tried_high:
            return self.high
        if not self.tried_low:
            return self.low
        return None

    def tell(self, share: float, within: bool) -> None:
        """What came of it."""
        if share == self.high:
            self.tried_high = True
            self.tried_low = self.tried_low or not within  # below what is not good enough, nothing is
        elif share == self.low:
            self.tried_low = True
        elif within:
            self.high, self.tried_high = share, True
        else:
            self.low, self.tried_low = share, True

    def retract(self, share: float, above: float) -> None:
        """What was within the drop is not, after all; above it, the nearest that still is."""
        self.tried_high = above != self.top
        self.low, self.tried_low, self.high = share, True, above


class _Trials:
    """Plans that were tried, by what they do: small networks have few costs, so that two targets may give one plan."""

    def __init__(
        self, limit: float, noise: float, config: SearchConfig, train: Callable[[str, int, Plan], float]
    ) -> None:
        self.limit, self.noise, self.config, self.train = limit, noise, config, train
        self.plans: dict[str, Plan] = {}
        self.scores: dict[str, list[float]] = {}
        self.shares: dict[str, list[float]] = {}
        self.used = 0

    def add(self, share: float, plan: Plan) -> str:
        key = _digest(plan)
        self.plans.setdefault(key, plan)
        self.scores.setdefault(key, [])
        self.shares.setdefault(key, []).append(share)
        return key

    def once(self, key: str, progress: Progress | None) -> None:
        """Train it with the next seed."""
        plan, scores = self.plans[key], self.scores[key]
        if progress is not None:
            progress(self.used, self.config.trainings, f"{plan.target}, seed {len(scores)}")
        scores.append(self.train(key, len(scores), plan))
        self.used += 1

    def decide(self, key: str, progress: Progress | None) -> None:
        """Train it until its mean score is clear of the limit."""
        while self.used < self.config.trainings and not self._clear(self.scores[key]):
            self.once(key, progress)

    def _clear(self, scores: list[float]) -> bool:
        if not scores:
            return False
        far = abs(fmean(scores) - self.limit) >= self.noise / math.sqrt(len(scores))
        return far or len(scores) >= self.config.repeats

    def within(self, key: str) -> bool:
        return fmean(self.scores[key]) >= self.limit

    def confirmed(self, key: str) -> bool:
        """Whether it was trained as often as is allowed; once is enough where scores have no noise."""
        return len(self.scores[key]) >= (self.config.repeats if self.noise else 1)

    @property
    def good(self) -> list[str]:
        return [key for key in self.plans if self.within(key)]

    @property
    def cheapest(self) -> str | None:
        return min(self.good, key=lambda key: self.plans[key].macs_after, default=None)

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(
            Probe(plan.target, plan.macs_after, plan.ratio, tuple(self.scores[key]), self.within(key))
            for key, plan in self.plans.items()
        )


def _percent(share: float) -> str:
    """A target, rounded up: the narrowest student has one, too."""
    return f"{math.ceil(share * 1e4) / 100:.2f}%"


def _digest(plan: Plan) -> str:
    """Of what a plan does, and not of what was asked."""
    content = json.loads(plan.to_json())
    content.pop("target", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class _File:
    """Scores on disk, replaced as a whole with every one."""

    def __init__(self, folder: str | Path | None, key: Mapping[str, str]) -> None:
        self.key = dict(key)
        self.found: dict[str, dict[str, Any]] = {}
        digest = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]
        self.path = None if folder is None else Path(folder, f"search-{digest}.json")
        if self.path is not None and self.path.exists():
            try:
                data = json.loads(self.path.read_text("utf-8"))
                if data["schema"] != SCHEMA or data["key"] != self.key:
                    raise ValueError(f"schema {data['schema']!r}, this version writes {SCHEMA}")
                self.found = {str(k): {**v, "score": float(v["score"])} for k, v in data["trainings"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SearchError(
                    f"the scores in '{self.path}' can't be read ({type(error).__name__}: {error}); delete the file to"
                    " train anew"
                ) from None

    def score(self, plan_key: str, seed: int, plan: Plan, train: Train, epochs: int) -> float:
        """The score of a training: the one that is there, or a new one."""
        key = f"{plan_key} seed {seed}"
        if key not in self.found:
            value = finite(train(plan, epochs, seed), f"at {plan.target}")
            self.found[key] = {"target": plan.target, "method": plan.method, "macs": plan.macs_after, "score": value}
            if self.path is not None:
                content = {"schema": SCHEMA, "key": self.key, "trainings": self.found}
                files.write_text(self.path, json.dumps(content, indent=1) + "\n")
        return float(self.found[key]["score"])
