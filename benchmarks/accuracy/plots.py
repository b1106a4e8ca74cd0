"""Score against MACs and against time at batch 1, a line per arm over its budgets, in the look of the reports'."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.jobs import Row
from benchmarks.accuracy.networks import Network
from benchmarks.methods.times import Time
from dyncompress.plotting import GREY, INK, PALETTE, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float, float]
"""Cost, mean score, sample standard deviation (0 with one seed)."""


def draw(network: Network, rows: Sequence[Row], timed: Sequence[Time]) -> Figure:
    """Two panels that share the axis of scores; static arms are dashed, bars are one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    clock = {(t.subject, t.form): t.ratio for t in timed if t.batch == 1}
    for axes, found, name in (
        (left, points(rows), "MACs"),
        (right, points(rows, clock), "time at batch 1"),
    ):
        _panel(axes, found)
        axes.set_xlabel(f"{name}, as a share of the original's", color=INK)
        if any(found.values()):
            axes.axhline(100 * rows[0].original_accuracy, color=INK, linewidth=1, linestyle=":", label="original")
    left.set_ylabel(f"{network.score}, %", color=INK)
    left.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(network.title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def points(rows: Sequence[Row], clock: Mapping[tuple[str, str], float] | None = None) -> dict[str, list[Point]]:
    """Per arm its points, the cheapest first, of the longest training there is.

    Args:
        rows: Of one network.
        clock: Times by comparison and arm; without, the cost is in MACs.
    """
    longest, found = max(row.epochs for row in rows), {}
    for arm in ARMS:
        own = [row for row in rows if row.arm == arm and row.epochs == longest]
        line = []
        for budget in dict.fromkeys(row.budget for row in own):
            same = [row for row in own if row.budget == budget]
            name = f"{same[0].network}, {budget}, {longest} epochs"
            cost = same[0].macs / same[0].original_macs if clock is None else clock.get((name, arm))
            if cost is not None:
                said = [100 * row.accuracy for row in same]
                line.append((cost, statistics.fmean(said), statistics.stdev(said) if len(said) > 1 else 0.0))
        if line:
            found[arm] = sorted(line)
    return found


def _panel(axes: Axes, found: Mapping[str, Sequence[Point]]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    colours = {arm: PALETTE[index % len(PALETTE)] for index, arm in enumerate(ARMS)}
    for arm, line in found.items():
        costs, means, spreads = zip(*line, strict=True)
        style = {"linestyle": "--", "markerfacecolor": "white"} if ARMS[arm].control else {}
        axes.errorbar(costs, means, spreads, color=colours[arm], marker="o", linewidth=1.2, label=arm, **style)  # type: ignore[arg-type]
