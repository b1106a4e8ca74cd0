"""What a user says of a search: how much of the score may be lost, and how long to look."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dyncompress.errors import SearchError, shown

_DROP = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(points?|absolute|)\s*", re.I)
_LEAST_POINTS = 0.05


@dataclass(frozen=True)
class SearchConfig:
    """How the search goes about it.

    Attributes:
        score: Name under which the module's validation step logs the score; higher is better.
        epochs: Epochs of every training.
        trainings: How many trainings there are at most, repeated ones included.
        tolerance: The search ends when the cheapest plan within the drop costs at most this part more than the dearest
            that is not.
        repeats: Trainings of one plan at most, each with another seed; of the one that is found, exactly.
        noise: Standard deviation of a score from seed to seed, in the unit of the drop; by default a quarter of the
            drop. The mean of n scores that is within noise / sqrt(n) of the limit asks for another.
        cache: Folder for the scores, one JSON file per network, weights, score and epochs.

    Raises:
        SearchError: If a value is out of its range.
    """

    score: str = "val_acc"
    epochs: int = 1
    trainings: int = 20
    tolerance: float = 0.05
    repeats: int = 3
    noise: float | None = None
    cache: str = "runs/search"

    def __post_init__(self) -> None:
        for key in ("epochs", "trainings", "repeats"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise SearchError(
                    f"search.{key} {shown(value)} is no number from 1; {getattr(SearchConfig, key)} is usual"
                )
        if not is_number(self.tolerance) or not 0 < self.tolerance < 1:
            raise SearchError(f"search.tolerance {shown(self.tolerance)} is not between 0 and 1; 0.05 is usual")
        if self.noise is not None and (not is_number(self.noise) or self.noise < 0):
            raise SearchError(
                f"search.noise {shown(self.noise)} is no standard deviation; give a number from 0, or None"
            )
        if not isinstance(self.score, str) or not self.score:
            raise SearchError(f"search.score {shown(self.score)} is no name; give what the validation step logs")
        if re.search("loss|error", self.score, re.I):
            raise SearchError(
                f"search.score {self.score!r} seems to be better where it is lower, and a drop is of a score that is"
                " better where it is higher; log such a score, the negative loss for one, under another name"
            )


@dataclass(frozen=True)
class Drop:
    """How much of a score may be lost, before it is known what range the score has.

    ``1.0``, ``"1 point"``: a point is a hundredth where the original's score lies between 0 and 1 (an accuracy of 0.93
    may fall to 0.92), and 1 for every other score (93 % in per cent to 92; a PSNR by 1 dB). ``"0.02 absolute"`` is in
    the score's own unit, whatever it is.

    Example:
        >>> Drop.parse(1.0).of(0.93), Drop.parse(1.0).of(93.0), Drop.parse("0.02 absolute").of(0.93)
        (0.01, 1.0, 0.02)
    """

    text: str
    value: float
    unit: str  # "", "points" or "absolute"

    @classmethod
    def parse(cls, given: object) -> Drop:
        """Read what a user gave.

        Raises:
            SearchError: If it is no drop.
        """
        if isinstance(given, Drop):
            return given
        value, unit = given, ""
        if isinstance(given, str) and (match := _DROP.fullmatch(given)):
            unit = match[2].lower().rstrip("s").replace("point", "points")
            try:
                value = float(match[1])
            except ValueError:
                value = None
        if not is_number(value) or not value > 0:  # type: ignore[operator]
            raise SearchError(
                f"max_drop {shown(given)} is no drop of a score; give points, 1.0 or '1 point' (0.93 to 0.92, 93 to"
                " 92), or '0.02 absolute', in the score's own unit"
            )
        return cls(str(given), float(value), unit)  # type: ignore[arg-type]

    @classmethod
    def alone(cls, given: object, **others: object) -> Drop | None:
        """`parse` what was given as max_drop, if anything, beside nothing else that decides what the student costs.

        Raises:
            SearchError: If it is no drop, or one of the others is given too.
        """
        if given is None:
            return None
        for key, value in others.items():
            if value is not None:
                raise SearchError(
                    f"{key} {shown(value)} is given beside max_drop {shown(given)}, which finds the cost itself; leave"
                    " one of them out"
                )
        return cls.parse(given)

    def of(self, baseline: float) -> float:
        """The drop in the unit of a score, of which the original's is known.

        Raises:
            SearchError: If points and fractions seem to be confused.
        """
        if self.unit == "absolute" or not 0 <= baseline <= 1:
            return self.value
        if not self.unit and self.value < _LEAST_POINTS:
            raise SearchError(
                f"max_drop {self.text} of a score of {baseline:.4g} can mean two things: '{self.text} points', which is"
                f" {self.value / 100:g} of it, or '{self.text} absolute'; write which"
            )
        return self.value / 100


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def finite(value: object, what: str) -> float:
    """A score as a number.

    Raises:
        SearchError: If it is none.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise SearchError(
            f"the score {what} is {shown(value)}; it must be a finite number, higher for a better network"
        )
    return number
