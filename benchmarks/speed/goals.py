"""What was asked for, and whether the numbers say so."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.speed.rows import Row, Section

LOWER = "MobileNetV2 at 15 %"  # a network of small layers, whose time falls more slowly than its MACs


@dataclass(frozen=True)
class Goal:
    """A bound on one number; where several rows fit, on the geometric mean of their ratios, or on their worst.

    Attributes:
        text: What it is, for people.
        limit: The bound.
        section: Where its rows are.
        arm: Of the rows, and so are ``base`` and ``batch``.
        base: What ``arm`` is compared with.
        batch: Images; None for any.
        subject: Network; "" for all.
        setting: What ran; "" for anything.
        quantity: A row's ratio, its seconds, or its error.
        at_least: Whether the limit is a lower one.
    """

    text: str
    limit: float
    section: str
    arm: str
    base: str
    batch: int | None = 1
    subject: str = ""
    setting: str = ""
    quantity: Literal["ratio", "seconds", "error"] = "ratio"
    at_least: bool = False

    def fits(self, row: Row) -> bool:
        """Whether the goal is about this row."""
        asked: dict[str, str | int] = {"arm": self.arm, "base": self.base, "mode": "fp32"}
        asked |= {k: v for k, v in (("batch", self.batch), ("subject", self.subject), ("setting", self.setting)) if v}
        return all(getattr(row, name) == value for name, value in asked.items())


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured.

    Attributes:
        goal: The goal.
        value: What was measured, in the goal's quantity.
        spread: Interquartile range of the ratios; for a mean, its smallest and largest member; "" where none is told.
        n: Rounds, of the row with the fewest; None where nothing was timed.
    """

    goal: Goal
    value: float
    spread: str
    n: int | None

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the limit."""
        return self.value >= self.goal.limit if self.goal.at_least else self.value <= self.goal.limit


def judge(goal: Goal, rows: tuple[Row, ...]) -> Verdict | None:
    """What the rows say of a goal; None where none of them is about it."""
    fitting = [row for row in rows if goal.fits(row)]
    if not fitting:
        return None
    n = min((row.n for row in fitting if row.n is not None), default=None)
    if goal.quantity == "error":
        return Verdict(goal, max(row.error for row in fitting if row.error is not None), "", n)
    if goal.quantity == "seconds":
        slowest = max(fitting, key=lambda row: row.ms or 0.0)
        assert slowest.ms is not None
        return Verdict(goal, slowest.ms / 1000, "", n)
    ratios = [row.ratio for row in fitting if row.ratio is not None]
    if len(ratios) == 1:
        return Verdict(goal, ratios[0], f"iqr {fitting[0].iqr:.2g}", n)
    return Verdict(goal, geometric_mean(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} shapes", n)


def verdicts(sections: Mapping[str, Section]) -> Iterator[Verdict]:
    """Of all goals that were measured; goals are about the CPU."""
    for goal in GOALS:
        found = judge(goal, sections[goal.section].rows) if goal.section in sections else None
        if found is not None:
            yield found


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios: that of 2 and 1/2 is 1."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _all() -> Iterator[Goal]:
    faster = Goal("", 0, "networks", "original", "dynamic", at_least=True)
    for subject, limit in {"ResNet-18": 2.0, "ResNet-50": 2.2, "MobileNetV2": 2.0, LOWER: 2.0}.items():
        yield replace(faster, text=f"{subject}, batch 1: student, times as fast", subject=subject, limit=limit)
    above = Goal("", 0, "networks", "dynamic", "static")
    for subject, limit in {
        "ResNet-18": 1.25,
        "ResNet-50": 1.30,
        "MobileNetV2": 1.35,
        "CIFAR ResNet-20": 1.40,
    }.items():
        yield replace(above, text=f"{subject}, batch 1: time, of its static widths", subject=subject, limit=limit)
    r18 = Goal("", 0, "", "dynamic", "original", batch=32, subject="ResNet-18")
    yield replace(r18, text="ResNet-18, batch 32: time, of the original", section="networks", limit=0.45)
    yield replace(r18, text="ResNet-18, training step, batch 32: time, of the original", section="training", limit=0.55)
    layer = Goal("", 0, "layers", "", "dynet", setting="training step", at_least=True)
    for peer, limit in {"ODConv 4x": 1.6, "KernelWarehouse 4x": 1.5, "CondConv": 1.0}.items():
        for batch in (8, 64):
            text = f"Layers in training, batch {batch}: times as fast as {peer}"
            yield replace(layer, text=text, arm=peer, batch=batch, limit=limit)
    plan = Goal("", 0, "planning", "", "make_plan", subject="ResNet-50", quantity="seconds")
    yield replace(plan, text="ResNet-50: `make_plan`, seconds", arm="make_plan", limit=5)
    yield replace(plan, text="ResNet-50: `convert`, seconds", arm="convert", limit=2)
    taught = Goal("", 1.05, "distillation", "distilled, less the teacher", "plain", batch=32)
    for subject in ("ResNet-18", "CIFAR ResNet-20"):
        yield replace(taught, text=f"{subject}: distilled step less the teacher, of the plain step", subject=subject)
    shipped = Goal("", 0, "deployment", "original", "dynamic", at_least=True)
    for subject, limit in {"ResNet-18": 1.8, "ResNet-50": 1.8, "MobileNetV2": 1.25}.items():
        yield replace(shipped, text=f"{subject} in onnxruntime: times as fast", subject=subject, limit=limit)
    yield Goal(
        "onnxruntime: largest difference from torch, of the largest output",
        *(1e-5, "deployment", "dynamic", "torch", None),
        quantity="error",
    )


GOALS = tuple(_all())
