"""The tables of docs/speed.md, one kind a section."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from benchmarks.speed.goals import geometric_mean
from benchmarks.speed.rows import Row

Table = Iterator[str]


def by_arm(rows: Sequence[Row]) -> Table:
    """A line per arm: its MACs, its time, and its time against the original and the static network."""
    yield "| | mode | batch | | MACs | ms | of the original | of static | n |"
    yield "|---|---|--:|---|--:|--:|--:|--:|--:|"
    for place, group in _places([row for row in rows if row.ms is not None]):
        for own in (row for row in group if row.base == "original"):
            static = next((row for row in group if (row.arm, row.base) == (own.arm, "static")), None)
            yield (
                f"| {place.subject} | {place.mode} | {place.batch} | {own.arm} | {_percent(own.macs)} |"
                f" {own.ms:.3g} | {_against(own)} | {_against(static)} | {own.n} |"
            )
    yield ""


def shipped(rows: Sequence[Row]) -> Table:
    """As `by_arm`, and how far the outputs are from torch's."""
    yield from by_arm(rows)
    errors = [row for row in rows if row.error is not None]
    if errors:
        yield "Largest difference of a student from torch, of the largest output:"
        yield ""
        yield from (f"- {row.subject}, batch {row.batch}: {row.error:.1e}" for row in errors)
        yield ""


def layers(rows: Sequence[Row]) -> Table:
    """A line per shape, a column per kind of layer; before it the means over the shapes."""
    arms = list(dict.fromkeys(row.arm for row in rows if row.base == "static"))
    peers = [arm for arm in arms if arm not in ("static", "dynet")]
    settings = list(dict.fromkeys((row.mode, row.setting, row.batch) for row in rows))
    if peers:
        yield "How many times as fast ours is, geometric mean over the shapes:"
        yield ""
        yield f"| mode | | batch | {' | '.join(peers)} |"
        yield f"|---|---|--:|{'--:|' * len(peers)}"
        for mode, setting, batch in settings:
            own = [row for row in rows if (row.mode, row.setting, row.batch) == (mode, setting, batch)]
            yield f"| {mode} | {setting} | {batch} | {' | '.join(_mean(own, arm) for arm in peers)} |"
        yield ""
    yield "Time, of the static convolution of the same shape (interquartile range of the rounds in brackets):"
    yield ""
    yield f"| shape | mode | | batch | static, ms | {' | '.join(arms[1:])} | n |"
    yield f"|---|---|---|--:|--:|{'--:|' * len(arms)}"
    for place, group in _places(rows):
        found = {row.arm: row for row in group if row.base == "static"}
        cells = " | ".join(_against(found.get(arm)) for arm in arms[1:])
        n, ms = found["static"].n, found["static"].ms
        yield f"| {place.subject} | {place.mode} | {place.setting} | {place.batch} | {ms:.3g} | {cells} | {n} |"
    yield ""


def planning(rows: Sequence[Row]) -> Table:
    """Seconds, a line per network."""
    yield "| | `make_plan`, s | `convert`, s | n |"
    yield "|---|--:|--:|--:|"
    for place, group in _places(rows):
        seconds = {row.arm: (row.ms or 0.0) / 1000 for row in group}
        yield f"| {place.subject} | {seconds['make_plan']:.2f} | {seconds['convert']:.2f} | {place.n} |"
    yield ""


def distillation(rows: Sequence[Row]) -> Table:
    """Milliseconds of a step and of its parts, a line per network."""
    yield "| | plain step, ms | teacher, ms | distilled step, ms | distilled less teacher, of plain | n |"
    yield "|---|--:|--:|--:|--:|--:|"
    for place, group in _places(rows):
        found = {row.arm: row for row in group}
        cells = " | ".join(f"{found[arm].ms:.3g}" for arm in ("plain", "teacher", "distilled"))
        yield f"| {place.subject} | {cells} | {_against(found['distilled, less the teacher'])} | {place.n} |"
    yield ""


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "networks": by_arm,
    "training": by_arm,
    "layers": layers,
    "pruning": by_arm,
    "planning": planning,
    "distillation": distillation,
    "deployment": shipped,
}


def _places(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Rows of one race together, with the first of them."""
    for _, group in groupby(rows, key=lambda row: (row.subject, row.setting, row.mode, row.batch)):
        together = list(group)
        yield together[0], together


def _mean(rows: Sequence[Row], peer: str) -> str:
    ratios = [row.ratio for row in rows if (row.arm, row.base) == (peer, "dynet") and row.ratio is not None]
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def _against(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return ""
    return f"1 ({row.iqr:.2g})" if row.arm == row.base else f"{row.ratio:.2f} ({row.iqr:.2g})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
