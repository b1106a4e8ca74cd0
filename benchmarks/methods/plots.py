"""Accuracy against latency and against parameters, one dot per form, in the look of the reports'."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.methods.forms import FORMS
from benchmarks.methods.runs import Run
from benchmarks.methods.times import Time
from dyncompress.plotting import GREY, INK, PALETTE, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 0.052  # of the height of a panel, per label


def draw(rows: Sequence[Run], timed: Sequence[Time]) -> Figure:
    """Two panels that share the axis of accuracy; each dot is led to its name on the right."""
    from matplotlib.figure import Figure

    clock = {row.form: row.ratio for row in timed if row.batch == 1}
    scores = {t: [100 * row.accuracy for row in rows if row.form == t] for t in FORMS if t in clock}
    scores = {title: found for title, found in scores.items() if found}
    params = {row.form: row.params / row.original_params for row in rows}
    figure = Figure(figsize=(12.5, 5.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, costs, name in zip(panels, (clock, params), ("time at batch 1", "parameters"), strict=True):
        _panel(axes, scores, {title: costs[title] for title in scores})
        axes.set_xlabel(f"{name}, as a multiple of the original's", color=INK)
    panels[0].set_ylabel("accuracy, %", color=INK)
    first = rows[0]
    figure.suptitle(
        f"All methods at {first.target} of the MACs, original {100 * first.original_accuracy:.2f} %"
        + (f"; bars: one sample standard deviation of {n} seeds" if (n := len({r.seed for r in rows})) > 1 else ""),
        x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, scores: dict[str, list[float]], costs: dict[str, float]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    means = {title: statistics.fmean(found) for title, found in scores.items()}
    low, high = min(means.values()), max(means.values())
    margin = 0.12 * (high - low) or 0.5
    low, high = low - margin, high + margin
    axes.set_ylim(low, high)
    left, right = min(costs.values()), max(costs.values())
    axes.set_xlim(left - 0.08 * (right - left or 1), right + 0.08 * (right - left or 1))
    ends = apart({title: (mean - low) / (high - low) for title, mean in means.items()}, _LINE)
    for index, (title, mean) in enumerate(means.items()):
        colour = GREY if title == "static" else PALETTE[index % len(PALETTE)]
        face = "white" if title == "static" else colour
        if len(scores[title]) > 1:
            axes.errorbar(costs[title], mean, statistics.stdev(scores[title]), color=colour, capsize=3)
        marker = "oDs^vP*X"[index % 8]
        axes.plot(costs[title], mean, marker, color=colour, markerfacecolor=face, markersize=8, zorder=4)
        axes.annotate(
            f"{title} {mean:.2f}",
            xy=(costs[title], mean),
            xytext=(1.03, ends[title]),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.55, "shrinkB": 5, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def apart(places: dict[str, float], gap: float) -> dict[str, float]:
    """Places from 0 to 1, moved so that no two are closer than a gap; their order stays.

    Example:
        >>> {name: round(place, 2) for name, place in apart({"a": 0.5, "b": 0.51, "c": 0.9}, 0.1).items()}
        {'a': 0.5, 'b': 0.6, 'c': 0.9}
    """
    found: dict[str, float] = {}
    last = -gap
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        last = found[name] = max(place, last + gap)
    above = max(0.0, last - 1)  # a stack that grew out at the top moves down as a whole
    ceiling = 1.0 + gap
    for name, place in sorted(found.items(), key=lambda item: -item[1]):
        ceiling = found[name] = min(place, ceiling - gap) if above else place
    return found
