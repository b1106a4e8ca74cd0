"""The networks that a report compares, and what the comparison says in words.

Three arms: the original, a static control (narrowed to the same MACs, trained alike) and the student. Without
the control nobody can tell what the dynamic convolutions bought and what narrowing alone would have done.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dyncompress.budget import UNITS, Limit
from dyncompress.errors import DynCompressError
from dyncompress.latency import Latency

TOLERANCE = 0.01  # of the target: what a planner reaches when widths come in steps
NOISE = 0.05  # latencies of whole networks that differ by less are equal, on a machine that is not exclusive
SAME_COST = 0.02  # control and student may differ by this fraction of their MACs: each hits the target within 1 %


@dataclass(frozen=True)
class Score:
    """Scores of one network by seed; higher is better.

    Attributes:
        seeds: Pairs of (seed, score).

    Example:
        >>> score = Score.of({0: 0.90, 1: 0.92, 2: 0.94})
        >>> round(score.mean, 4), round(score.std, 4), score.n
        (0.92, 0.02, 3)
    """

    seeds: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        odd = [f"{value} (seed {seed})" for seed, value in self.seeds if not math.isfinite(value)]
        names = [seed for seed, _ in self.seeds]
        if odd or len(set(names)) < len(names):
            raise DynCompressError(
                f"cannot average {', '.join(odd) or f'seeds {names}'} - scores are finite, one per seed, "
                "each seed once - leave failed runs out and say so"
            )

    @classmethod
    def of(cls, scores: Mapping[int, float] | float) -> Score:
        """From ``{seed: score}``, or from the score of a single network, as seed 0."""
        pairs = scores.items() if isinstance(scores, Mapping) else [(0, scores)]
        return cls(tuple((int(seed), float(value)) for seed, value in pairs))

    @property
    def values(self) -> tuple[float, ...]:
        """The scores alone."""
        return tuple(value for _, value in self.seeds)

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.seeds)

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None without any."""
        return statistics.fmean(self.values) if self.seeds else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None with fewer than two seeds, whose spread is not known."""
        return statistics.stdev(self.values) if self.n > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As in report.json."""
        return {
            "mean": self.mean,
            "std": self.std,
            "n": self.n,
            "seeds": {str(seed): value for seed, value in self.seeds},
        }


@dataclass(frozen=True)
class Arm:
    """One network of the comparison.

    Attributes:
        method: What its convolutions became: "dynet", "static"; "" for the original.
        macs: Multiply-adds per image at batch 1.
        params: Number of parameters.
        score: Scores by seed; may be empty.
        bank_bytes: Bytes of the kernel banks.
        latency: Measured latency by batch size; may be empty.
    """

    method: str
    macs: int
    params: int
    score: Score = field(default_factory=Score)
    bank_bytes: int = 0
    latency: Mapping[int, Latency] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As in report.json, all but the score, which has a place of its own there."""
        return {
            "method": self.method,
            "macs": self.macs,
            "params": self.params,
            "bank_bytes": self.bank_bytes,
            "latency": {str(size): asdict(latency) for size, latency in self.latency.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], score: Mapping[str, Any]) -> Arm:
        """From what :meth:`to_dict` and :meth:`Score.to_dict` gave."""
        latency = {int(size): Latency(**latency) for size, latency in data["latency"].items()}
        seeds = Score.of({int(seed): value for seed, value in score["seeds"].items()})
        return cls(**{**data, "latency": latency}, score=seeds)


def are_shares(scores: Iterable[float]) -> bool:
    """Whether scores are fractions of 1, which a person reads as percent."""
    return all(0 <= score <= 1 for score in scores)


@dataclass(frozen=True)
class Outcome:
    """One limit of the target, asked and achieved, as fractions of the original; None where it wasn't measured."""

    limit: Limit
    asked: float
    achieved: float | None

    @property
    def above(self) -> bool:
        """Whether the limit is exceeded, by more than its tolerance."""
        return self.achieved is not None and self.achieved / self.asked - 1 > self._tolerance

    @property
    def below(self) -> bool:
        """Whether the limit isn't reached, by more than its tolerance."""
        return self.achieved is not None and 1 - self.achieved / self.asked > self._tolerance

    @property
    def _tolerance(self) -> float:
        return NOISE if self.limit.quantity == "latency" else TOLERANCE

    def __str__(self) -> str:
        reached = "not measured" if self.achieved is None else f"{self.achieved:.1%}"
        return f"asked {self.limit.text}, achieved {reached} of the original's {UNITS[self.limit.quantity]}"


def notes(original: Arm, static: Arm | None, student: Arm, timed: bool = False) -> list[str]:
    """Sentences that a reader of the numbers must not miss; empty when there is nothing to warn of.

    Where time was limited (``timed``), nobody is told to limit it.

    Two mean scores differ when they are further apart than two standard errors of their difference,
    2 sqrt(s1^2/n1 + s2^2/n2); latencies differ when their ratio is further from 1 than 5 % and than its
    interquartile range.
    """
    found = [*_latency_notes(original, student, timed)]
    if student.params > original.params:
        found.append(f"parameters grew to {student.params / original.params:.2f}x of the original")
    if static is None or student.method == "static":
        return found
    return [*found, *_control_notes(static, student)]


def _latency_notes(original: Arm, student: Arm, timed: bool) -> Iterator[str]:
    share = student.macs / original.macs
    if share >= 1:
        return
    slower = {size: each.ratio for size, each in student.latency.items() if each.ratio > 1 + max(NOISE, each.iqr)}
    if slower:
        where = " and ".join(f"batch {size} ({ratio:.2f}x)" for size, ratio in slower.items())
        ways = ["a latency target"] * (not timed) + ["method='static'"] * (student.method != "static")
        advice = f": for speed give {' or '.join(ways)}" if ways else ""
        yield f"slower than the original at {where} although FLOPs fell to {share:.0%}{advice}"
    for size, latency in student.latency.items():
        if size not in slower and latency.ratio > 1 - max(NOISE, latency.iqr):
            yield f"FLOPs fell to {share:.0%} but batch-{size} latency is {latency.ratio:.2f}x of the original"


def _control_notes(static: Arm, student: Arm) -> Iterator[str]:
    cost = student.macs / static.macs
    if abs(cost - 1) > SAME_COST:
        yield f"the comparison is not at equal cost: the student has {cost:.2f}x the MACs of the control"
    yield from _score_notes(static.score, student.score)
    for size in sorted(student.latency.keys() & static.latency.keys()):
        one, other = student.latency[size], static.latency[size]
        noise = math.hypot(one.iqr / one.ratio, other.iqr / other.ratio)
        if (slower := one.ratio / other.ratio) > 1 + max(NOISE, noise):
            yield f"at batch {size} the dynamic network takes {slower:.2f}x the time of the static control"


def _score_notes(static: Score, student: Score) -> Iterator[str]:
    if static.mean is None or student.mean is None:
        yield "no score of the static control and the dynamic network to compare"
        return

    def points(value: float) -> str:
        return f"{100 * value:.2f}" if percent else f"{value:.4g}"

    percent = are_shares([*static.values, *student.values])
    gain = round(student.mean - static.mean, 9)  # equal means may differ in their last bits
    means = f"{points(student.mean)} against {points(static.mean)}"
    not_better = f"the dynamic network is not better than the static control: {means}"
    if static.std is None or student.std is None:
        chance = "the gain over the static control may be chance, a single seed has no spread"
        yield f"{chance}: {means}" if gain > 0 else not_better
        return
    spread = 2 * math.sqrt(static.std**2 / static.n + student.std**2 / student.n)
    seeds = f"two standard errors are {points(spread)}, {student.n} and {static.n} seeds"
    if abs(gain) <= spread:
        pair = "the dynamic network and the static control"
        yield f"no difference within the spread between {pair}: {means} ({seeds})"
    elif gain < 0:
        yield f"{not_better} ({seeds})"
