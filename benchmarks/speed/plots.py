"""A picture per section, in the look of the reports'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.speed.rows import Row, Section
from dyncompress.plotting import GREY, INK, PALETTE, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"static": GREY, "dynamic": PALETTE[0], "dynet": PALETTE[0], "torch-pruning": PALETTE[1]}
_BARS = {"networks", "training", "pruning", "deployment"}
_DOTS = {"layers"}


def has(kind: str) -> bool:
    """Whether a section of this kind has a picture."""
    return kind in _BARS | _DOTS


def draw(section: Section) -> Figure | None:
    """The picture of a section; None where a table says it all."""
    kind = section.name.partition("-")[0]
    rows = [row for row in section.rows if row.ratio is not None]
    if not rows or not has(kind):
        return None
    return _bars(rows) if kind in _BARS else _dots(rows)


def _figure(columns: int, rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=160, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def _style(axes: Axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)


def _bars(rows: Sequence[Row]) -> Figure:
    """Time of every arm as a share of the original's: a panel per mode and batch size, a group of bars per network."""
    against = [row for row in rows if row.base == "original" and row.arm != "original"]
    panels = list(dict.fromkeys((row.mode, row.batch) for row in against))
    networks = list(dict.fromkeys(row.subject for row in against))
    arms = list(dict.fromkeys(row.arm for row in against))
    columns = min(2, len(panels))
    figure, axes = _figure(columns, -(-len(panels) // columns), max(2.0 + 1.35 * len(networks), 4.4), 3.4)
    for place, (mode, batch) in zip(axes, panels, strict=False):
        _style(place, f"{mode}, batch {batch}")
        place.grid(axis="y", color=RULE, linewidth=0.8)
        width = 0.8 / len(arms)
        for i, arm in enumerate(arms):
            own = {r.subject: r for r in against if (r.mode, r.batch, r.arm) == (mode, batch, arm)}
            at = [k + (i - (len(arms) - 1) / 2) * width for k, name in enumerate(networks) if name in own]
            heights = [row.ratio for row in own.values()]
            spread = [(row.iqr or 0) / 2 for row in own.values()]
            bars = place.bar(at, heights, width * 0.9, color=_COLOURS[arm], label=arm, yerr=spread, ecolor=INK)  # type: ignore[arg-type]
            place.bar_label(bars, fmt="%.2f", fontsize=8, color=INK, padding=2)
        place.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        place.set_xticks(range(len(networks)), networks)
        place.set_ylim(0, max(1.15, 1.2 * max((r.ratio or 0) for r in against)))
        place.set_ylabel("time, of the original" if place is axes[0] else "", fontsize=9)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms), frameon=False)
    return figure


def _dots(rows: Sequence[Row]) -> Figure:
    """Time of every kind of layer as a multiple of the static one's: a panel per setting, a line per shape."""
    against = [row for row in rows if row.base == "static" and row.arm != "static"]
    panels = list(dict.fromkeys((row.mode, row.setting, row.batch) for row in against))
    shapes = list(dict.fromkeys(row.subject for row in against))
    arms = list(dict.fromkeys(row.arm for row in against))
    figure, axes = _figure(2, -(-len(panels) // 2), 6.2, 1.0 + 0.32 * len(shapes))
    for number, (place, (mode, setting, batch)) in enumerate(zip(axes, panels, strict=False)):
        _style(place, f"{setting}, batch {batch}, {mode}")
        place.grid(axis="both", color=RULE, linewidth=0.8)
        for i, arm in enumerate(arms):
            own = [r for r in against if (r.mode, r.setting, r.batch, r.arm) == (mode, setting, batch, arm)]
            ours = arm == "dynet"
            place.plot(
                [row.ratio for row in own],  # type: ignore[arg-type]
                [shapes.index(row.subject) for row in own],
                "o" if ours else "Ds^vP*"[(i - 1) % 6],
                color=PALETTE[i % len(PALETTE)],
                markersize=8 if ours else 6,
                zorder=4 if ours else 3,
                alpha=1 if ours else 0.85,
                label=arm,
            )
        place.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        place.set_xscale("log")
        ticks = [0.5, 1, 2, 4, 8, 16, 32]
        place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        place.minorticks_off()
        low, high = min(r.ratio or 1 for r in against), max(r.ratio or 1 for r in against)
        place.set_xlim(min(0.8, low / 1.1), high * 1.15)
        place.set_yticks(range(len(shapes)), shapes if number % 2 == 0 else [""] * len(shapes))
        place.invert_yaxis()
        place.set_xlabel("time, of the static convolution", fontsize=9)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms), frameon=False)
    return figure
