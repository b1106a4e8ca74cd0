"""Score against MACs and against time at batch 1, a line per arm over its budgets, in the look of the reports'."""

from __future__ import annotations

import statistics
from collections import Counter
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

_NARROW = 0.1  # of an axis of costs


def draw(network: Network, rows: Sequence[Row], timed: Sequence[Time]) -> Figure:
    """A panel for MACs and, once there are times, one of these; static arms are dashed, bars one standard deviation."""
    from matplotlib.figure import Figure

    clock = {(t.subject, t.form): t.ratio for t in timed if t.batch == 1}
    panels = [(points(rows), "MACs"), (points(rows, clock), "time at batch 1")]
    panels = [panel for panel in panels if panel[0]]
    figure = Figure(figsize=(6.5 * len(panels), 5.6), dpi=150, layout="constrained")
    (row,) = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (found, name) in zip(row, panels, strict=True):
        _panel(axes, found)
        axes.set_xlabel(f"{name}, as a share of the original's", color=INK)
        axes.axhline(100 * rows[0].original_accuracy, color=INK, linewidth=1, linestyle=":", label="original")
    left = row[0]
    left.set_ylabel(f"{network.score}, %", color=INK)
    left.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(network.title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def points(rows: Sequence[Row], clock: Mapping[tuple[str, str], float] | None = None) -> dict[str, list[Point]]:
    """Per arm its points, the cheapest first, of the epochs that most rows have.

    Args:
        rows: Of one network.
        clock: Times by comparison and arm; without, the cost is in MACs.
    """
    ((usual, _),) = Counter(row.epochs for row in rows).most_common(1)
    found = {}
    for arm in ARMS:
        own = [row for row in rows if row.arm == arm and row.epochs == usual]
        line = []
        for budget in dict.fromkeys(row.budget for row in own):
            same = [row for row in own if row.budget == budget]
            name = f"{same[0].network}, {budget}, {usual} epochs"
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
    low, high = (end(cost for line in found.values() for cost, *_ in line) for end in (min, max))
    if high - low < _NARROW:  # one budget: differences within it are no more than how it was landed on
        axes.set_xlim((low + high - _NARROW) / 2, (low + high + _NARROW) / 2)
