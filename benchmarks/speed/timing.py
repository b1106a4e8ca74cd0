"""Arms that take turns, and what their times say of each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.speed.rows import Row
from dyncompress.latency import MIN_ROUNDS, interleave, summarise

LEAST_S = 0.002
"""A pass that ends sooner is repeated: reading the clock, and whatever another arm left in the caches, would show."""


@dataclass(frozen=True)
class Race:
    """Times of several arms, taken in turns.

    Attributes:
        arms: Their names.
        times: Seconds: one list per round with one time per arm.
    """

    arms: tuple[str, ...]
    times: list[list[float]]

    def rows(self, bases: Iterable[str] = (), *, macs: Mapping[str, float] | None = None, **labels: Any) -> list[Row]:
        """Every arm against the first one, and against the others that are named.

        Args:
            bases: More arms to compare with; those that did not run are left out.
            macs: MACs by arm.
            **labels: What all rows have in common: subject, setting, batch, mode.
        """
        found = []
        for base in dict.fromkeys([self.arms[0], *bases]):
            for arm in self.arms:
                if base in self.arms and (arm != base or base == self.arms[0]):
                    said = summarise(self.times, self.arms.index(arm), self.arms.index(base))
                    found.append(
                        Row(
                            arm=arm,
                            base=base,
                            ms=said.median_ms,
                            ratio=said.ratio,
                            iqr=said.iqr,
                            n=len(self.times),
                            macs=(macs or {}).get(arm),
                            **labels,
                        )
                    )
        return found

    def with_arm(self, name: str, time_of: Callable[[Mapping[str, float]], float]) -> Race:
        """The race with one more arm, whose time in each round follows from those of the others."""
        more = [[*row, time_of(dict(zip(self.arms, row, strict=True)))] for row in self.times]
        return Race((*self.arms, name), more)


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: At most so many rounds a race, at least 5.
        seconds: After which no further round of a race starts; five run in any case.
        device: Where the arms compute.
    """

    rounds: int = 20
    seconds: float = 8.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def race(self, arms: Mapping[str, Callable[[], Any]]) -> Race:
        """Let the arms run, the fastest for `LEAST_S` a pass, all equally often."""
        for call in arms.values():
            call()  # compilers, caches and workspaces
        times = max(1, math.ceil(LEAST_S / max(min(map(self._once, arms.values())), 1e-9)))
        passes = [partial(_repeat, call, times) for call in arms.values()]
        found = interleave(passes, self.device, rounds=self.rounds, budget_s=self.seconds)
        return Race(tuple(arms), [[seconds / times for seconds in row] for row in found])

    def time_once_each_way(self, arms: Mapping[str, Callable[[], Any]]) -> Race:
        """As `race`, for what takes seconds and needs no warming up."""
        return Race(tuple(arms), interleave(list(arms.values()), self.device, rounds=MIN_ROUNDS, budget_s=self.seconds))

    def _once(self, call: Callable[[], Any]) -> float:
        synchronize: Callable[[], None] = getattr(torch, self.device.type).synchronize
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - start


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()
