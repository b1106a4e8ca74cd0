"""The tables of docs/results.md: between its markers the page is a pure function of the CSVs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import dependence
from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.jobs import Row, store
from benchmarks.accuracy.networks import NETWORKS
from benchmarks.accuracy.plots import draw
from benchmarks.accuracy.verdicts import Verdict, complete, hardest, scores
from benchmarks.methods import times
from benchmarks.methods.page import filled
from benchmarks.methods.times import Time
from benchmarks.trainings import ROOT
from dyncompress import files
from dyncompress.arms import Score

RESULTS = ROOT / "benchmarks/results/accuracy"
PAGE = ROOT / "docs/results.md"
NONE = "No rows yet."


def publish(results: Path, page: Path) -> Iterator[Path]:
    """Draw the plots and fill in the page; yields what was written."""
    for name in NETWORKS:
        found = store(results / f"{name}.csv").read()
        if found:
            path = results / f"{name}.png"
            draw(NETWORKS[name], found, times.store(results / f"{name}-times.csv").read()).savefig(path)
            yield path
    files.write_text(page, filled(page.read_text("utf-8"), sections(results)))
    yield page


def sections(results: Path) -> dict[str, str]:
    """What stands between the markers: a section per network, and the comparisons in one table."""
    found = {name: store(results / f"{name}.csv").read() for name in NETWORKS}
    made = {name: "\n".join(_network(name, rows, results)) if rows else NONE for name, rows in found.items()}
    depends = dependence.store(results).read()
    return {
        "verdicts": "\n".join(_verdicts(found)),
        "dependence": "\n".join(dependence.table(depends)) if depends else NONE,
        **made,
    }


def comparisons(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by budget and epochs, those that are compared with each other."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.budget, row.epochs), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], "latency" in item[0][0], -_share(item[0][0]))))


def _share(budget: str) -> float:
    return float(budget.partition("%")[0])


def _verdicts(found: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Per comparison, the best dynamic arm against the best static one."""
    lines = []
    for name, rows in found.items():
        for (budget, epochs), own in comparisons(rows).items():
            reached = scores(own)
            control = hardest(reached, tuple(ARMS.values()))
            others = {a: s for a, s in reached.items() if a in ARMS and not ARMS[a].control}
            if control is None or not others:
                continue
            others = complete(others)
            best = max(others, key=lambda arm: others[arm].mean or 0.0)
            verdict = Verdict.of(others[best], reached[control])
            lost = 100 * ((others[best].mean or 0.0) - own[0].original_accuracy)
            lines.append(
                f"| {NETWORKS[name].title} | {budget} | {epochs} | {best} | {control} | {verdict} | {verdict.word} |"
                f" {_to_peer(others[best], reached)} | {lost:+.2f} |"
            )
    if not lines:
        yield NONE
        return
    yield (
        "| network | budget | epochs | best dynamic arm | best static arm | difference | | to torch-pruning |"
        " to the original |"
    )
    yield "|---|---|--:|---|---|--:|---|--:|--:|"
    yield from lines


def _to_peer(best: Score, reached: Mapping[str, Score]) -> str:
    """The difference to the better of torch-pruning's arms."""
    peers = [reached[arm.title] for arm in ARMS.values() if arm.pruner and arm.title in reached]
    return str(Verdict.of(best, max(peers, key=lambda score: score.mean or 0.0))) if peers else ""


def _network(name: str, rows: Sequence[Row], results: Path) -> Iterator[str]:
    network, timed = NETWORKS[name], times.store(results / f"{name}-times.csv").read()
    for (budget, epochs), own in comparisons(rows).items():
        yield f"**{budget}{'' if 'latency' in budget else ' of the MACs'}, {epochs} epochs**"
        yield ""
        yield from _table(network.score, own, [t for t in timed if t.subject == subject(name, budget, epochs)])
        yield ""
    yield from _provenance(rows)
    yield ""
    notes = results / f"{name}-times.json"
    if notes.exists():
        yield f"Times: {_timed(notes)}"
        yield ""
    yield f"![{network.title}](../benchmarks/results/accuracy/{name}.png)"


def subject(network: str, budget: str, epochs: int) -> str:
    """What a comparison is called in the rows of times."""
    return f"{network}, {budget}, {epochs} epochs"


def _table(score: str, rows: Sequence[Row], timed: Sequence[Time]) -> Iterator[str]:
    clock = {(t.form, t.batch): t for t in timed}
    batches = sorted({t.batch for t in timed})
    heads = "".join(f" time, batch {batch} |" for batch in batches)
    yield f"| | MACs | parameters |{heads} {score}, % | seeds | to the best static arm | |"
    yield f"|---|--:|--:|{'--:|' * len(batches)}--:|--:|--:|---|"
    first, reached = rows[0], scores(rows)
    yield (
        f"| original | {first.original_macs / 1e6:.1f} M | {first.original_params / 1e3:.0f} k |"
        f"{' 1.00 |' * len(batches)} {100 * first.original_accuracy:.2f} | | | |"
    )
    control = hardest(reached, tuple(ARMS.values()))
    for arm in (title for title in ARMS if title in reached):
        row, said = next(row for row in rows if row.arm == arm), reached[arm]
        spread = "" if said.std is None else f" ± {100 * said.std:.2f}"
        times_ = "".join(_clock(clock.get((arm, batch))) for batch in batches)
        verdict = Verdict.of(said, reached[control]) if control and arm != control else None
        told = f"{verdict} | {verdict.word}" if verdict else " | best static arm" if arm == control else " |"
        yield (
            f"| {arm} | {row.macs / row.original_macs:.1%} | {row.params / row.original_params:.2f}x |{times_}"
            f" {100 * (said.mean or 0.0):.2f}{spread} | {said.n} | {told} |"
        )


def _clock(row: Time | None) -> str:
    return " |" if row is None else f" {row.ratio:.2f} ({row.iqr:.2f}) |"


def _provenance(rows: Sequence[Row]) -> Iterator[str]:
    commits = ", ".join(f"`{name}`" for name in dict.fromkeys(row.commit for row in rows) if name)
    last = max(rows, key=lambda row: row.date)
    hardware = "; ".join(dict.fromkeys(row.hardware for row in rows))
    threads = f"{last.threads} torch thread{'s' * (last.threads > 1)}"
    yield f"Trained on {hardware}, {threads}; {last.versions}; commit {commits}; until {last.date[:10]}."


def _timed(path: Path) -> str:
    here: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return (
        f"against the original's, students of the first seed as they are shipped, in turns; medians of up to"
        f" {here['rounds']} rounds or {here['seconds']:g} s, interquartile ranges in brackets; {here['hardware']},"
        f" {here['threads']} thread, commit `{here['commit']}`, {here['date'][:10]}. `{here['command']}`"
    )
