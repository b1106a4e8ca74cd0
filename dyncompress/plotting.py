"""The trade-off as a picture: score against cost, with every seed in sight.

Knows nothing of reports: it draws panels of points. matplotlib is imported when something is drawn, and used
through its objects (no pyplot), so a plot inside somebody's training touches none of their figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTROL = "static"
INK, GREY, RULE = "#222222", "#777777", "#e4e4e4"
# Okabe and Ito's colours, told apart with any colour vision; the control is grey and hollow.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Point:
    """One compressed network.

    Attributes:
        series: Name of the method; points of one series are joined by a line.
        costs: Costs by kind, such as {"MACs": 0.33}, as fractions of the original.
        scores: Score of each seed.
    """

    series: str
    costs: Mapping[str, float]
    scores: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One row of the picture: the networks made from one original.

    Attributes:
        title: What was compressed.
        score_name: What the scores are, such as "val_acc".
        percent: Whether scores are fractions of 1, to be written as percent.
        original: Scores of the original, whose costs are 1 by definition; may be empty.
        points: The compressed networks; one without a score is left out.
    """

    title: str
    score_name: str
    percent: bool
    original: Sequence[float]
    points: Sequence[Point]


def draw(panels: Sequence[Panel], costs: Sequence[str], footer: str = "") -> Figure:
    """Draw one row per panel and one column per kind of cost; the columns of a row share the score axis.

    A dot is a mean over seeds, its bar one sample standard deviation, the faint dots beside it are the seeds.

    Args:
        panels: At least one.
        costs: Kinds of cost, at least one; points without a cost of that kind are left out of its column.
        footer: Where the numbers come from, in small print.

    Returns:
        A figure of its own; save it with ``figure.savefig(path)`` or turn it into an array by :func:`pixels`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    names = sorted({point.series for panel in panels for point in panel.points} - {CONTROL})
    colours = {CONTROL: GREY} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    figure = Figure(figsize=(1.4 + 3.8 * len(costs), 0.6 + 3.5 * len(panels)), dpi=160, layout="constrained")
    grid = figure.subplots(len(panels), len(costs), sharey="row", squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        for axes, cost in zip(row, costs, strict=True):
            _style(axes)
            axes.set_xlabel(f"{cost}, % of the original")
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
            _fill(axes, panel, cost, colours)
        row[0].set_ylabel(f"{panel.score_name}, %" if panel.percent else panel.score_name)
        if panel.percent:
            row[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        row[0].set_title(panel.title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=12)
    figure.supxlabel(footer, x=0.01, ha="left", fontsize=6, color=GREY)
    return figure


def pixels(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The figure as an array [height, width, 3] of uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()  # type: ignore[no-untyped-call]


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)


def _fill(axes: Axes, panel: Panel, cost: str, colours: Mapping[str, str]) -> None:
    shown = [point for point in panel.points if point.scores and cost in point.costs]
    right = 1.1 * max(1.0, *(point.costs[cost] for point in shown), 0)
    axes.set_xlim(0, right)
    labels = []
    for series, colour in colours.items():
        mine = sorted((p for p in shown if p.series == series), key=lambda p: p.costs[cost])
        xs, means = [p.costs[cost] for p in mine], [statistics.fmean(p.scores) for p in mine]
        axes.plot(xs, means, color=colour, linewidth=1.2, alpha=0.6, zorder=2)
        for x, point in zip(xs, mine, strict=True):
            _draw_seeds(axes, x, point.scores, colour, hollow=series == CONTROL)
        if mine:  # a series is named once, at its most expensive network
            labels.append((xs[-1], means[-1], series + _value(means, panel.percent), colour))
    if panel.original:
        mean = statistics.fmean(panel.original)
        axes.axhline(mean, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        _draw_seeds(axes, 1.0, panel.original, INK, hollow=False)
        axes.text(
            *(0.01 * right, mean),
            "original" + _value([mean], panel.percent),
            transform=_shifted(axes, y=3),
            color=INK,
            fontsize=9,
        )
    axes.margins(y=0.18)
    axes.autoscale_view(scalex=False)
    _write_labels(axes, labels)


def _draw_seeds(axes: Axes, x: float, scores: Sequence[float], colour: str, *, hollow: bool) -> None:
    mean = statistics.fmean(scores)
    if len(scores) > 1:
        beside = _shifted(axes, x=-7)
        axes.plot([x] * len(scores), scores, "o", color=colour, ms=3.5, mew=0, alpha=0.45, transform=beside)
        axes.errorbar(x, mean, statistics.stdev(scores), color=colour, capsize=3, elinewidth=1.2, zorder=3)
    face = "white" if hollow else colour
    axes.plot(x, mean, "o", color=colour, markerfacecolor=face, markersize=7, markeredgewidth=1.6, zorder=4)


def _write_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each text beside its (x, y), pushed upwards where it would lie on a lower one."""
    right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
    width, height = 0.35 * right, 0.07 * (high - low)  # of a text, generously
    written: list[tuple[float, float]] = []
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        for other_x, other_y in written:
            if abs(x - other_x) < width:
                y = max(y, other_y + height)
        written.append((x, y))
        left = x > 0.8 * right  # no room on the right
        axes.text(
            *(x, y, text),
            transform=_shifted(axes, x=-13 if left else 9),
            ha="right" if left else "left",
            va="center",
            color=colour,
            fontsize=9,
            fontweight="bold",
        )


def _shifted(axes: Axes, x: float = 0, y: float = 0) -> Any:
    """Data coordinates moved by so many printer's points."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(x / 72, y / 72, axes.figure.dpi_scale_trans)


def _value(means: Sequence[float], percent: bool) -> str:
    """The score of a series that is one network; a line is read off the axis."""
    if len(means) > 1:
        return ""
    return f" {means[0]:.2%}" if percent else f" {means[0]:.4g}"
