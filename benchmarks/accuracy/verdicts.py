"""Whether one arm is ahead of another, in points and in a word."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.accuracy.arms import Arm
from benchmarks.accuracy.jobs import Row
from dyncompress.arms import Score


@dataclass(frozen=True)
class Verdict:
    """A difference of mean scores, in points (1 % of the whole).

    Attributes:
        gain: Mean of one minus mean of the other.
        spread: Two standard errors of that, ``2 sqrt(s1^2/n1 + s2^2/n2)``; None where one has a single seed.

    Example:
        >>> found = Verdict.of(Score.of({0: 0.84, 1: 0.86}), Score.of({0: 0.80, 1: 0.80}))
        >>> round(found.gain, 6), round(found.spread, 6), found.word
        (5.0, 2.0, 'ahead')
    """

    gain: float
    spread: float | None

    @classmethod
    def of(cls, one: Score, other: Score) -> Verdict:
        """From the scores by seed; of the seeds that both have, where they share some: they are good or bad for all."""
        shared = dict(one.seeds).keys() & dict(other.seeds).keys()
        if shared:
            one, other = (Score.of({k: v for k, v in each.seeds if k in shared}) for each in (one, other))
        assert one.mean is not None and other.mean is not None
        gain = 100 * round(one.mean - other.mean, 9)  # equal means may differ in their last bits
        if one.std is None or other.std is None:
            return cls(gain, None)
        return cls(gain, 200 * math.sqrt(one.std**2 / one.n + other.std**2 / other.n))

    @property
    def word(self) -> str:
        """``ahead``, ``behind``, ``no difference``, or, of single seeds, ``one seed``: it may be chance."""
        if self.spread is None:
            return "one seed"
        return "no difference" if abs(self.gain) <= self.spread else "ahead" if self.gain > 0 else "behind"

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{round(self.gain, 2) + 0.0:+.2f}{spread}"  # no -0.00


def scores(rows: Iterable[Row]) -> dict[str, Score]:
    """Scores by arm, of rows of one comparison."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row.arm, {})[row.seed] = row.accuracy
    return {arm: Score.of(each) for arm, each in found.items()}


def complete(found: Mapping[str, Score]) -> dict[str, Score]:
    """Those with as many seeds as any: one good seed is no match for a mean of three."""
    most = max((score.n for score in found.values()), default=0)
    return {arm: score for arm, score in found.items() if score.n == most}


def hardest(found: Mapping[str, Score], arms: Sequence[Arm]) -> str | None:
    """The control with the best mean of those with most seeds: chosen after the fact, which helps it."""
    there = complete({arm.title: found[arm.title] for arm in arms if arm.control and arm.title in found})
    return max(there, key=lambda title: there[title].mean or 0.0) if there else None
