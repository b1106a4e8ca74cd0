"""The tables of docs/methods/README.md: between their markers the page is a pure function of the CSVs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import runs, times
from benchmarks.methods.forms import FORMS
from benchmarks.methods.plots import draw
from benchmarks.methods.runs import Run
from benchmarks.methods.times import BATCHES, SHAPES, Time
from benchmarks.trainings import ROOT
from dyncompress import files

RESULTS = ROOT / "benchmarks/results/methods"
SUBJECT = "CIFAR-10 ResNet-20"
PAGE = ROOT / "docs/methods/README.md"
PICTURE = "cifar10_resnet20.png"
_CHOICE = list(SHAPES)[1]  # the shape that the table of choices quotes


def publish(results: Path, page: Path) -> Iterator[Path]:
    """Draw the plot and fill in the page; yields what was written."""
    found, timed = runs.store(results / "cifar10_resnet20.csv").read(), times.store(results / "students.csv").read()
    if found and timed:
        draw(found, timed).savefig(results / PICTURE)
        yield results / PICTURE
    files.write_text(page, filled(page.read_text("utf-8"), sections(results)))
    yield page


def sections(results: Path) -> dict[str, str]:
    """What stands between the markers of each section."""
    alone = times.store(results / "layers.csv").read()
    found, timed = runs.store(results / "cifar10_resnet20.csv").read(), times.store(results / "students.csv").read()
    made = {
        "choice": _choice(alone) if alone else [],
        "layers": [*_layers(alone), "", _origin(results / "layers.json")] if alone else [],
        "networks": _networks(found, timed, results) if found else [],
    }
    return {name: "\n".join(lines) for name, lines in made.items()}


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with its marked sections replaced.

    Example:
        >>> filled("a <!-- x -->old<!-- /x --> z", {"x": "new"}).split()
        ['a', '<!--', 'x', '-->', 'new', '<!--', '/x', '-->', 'z']
    """
    for name, text in made.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def _choice(rows: Sequence[Time]) -> list[str]:
    own = {(row.form, row.batch): row for row in rows if row.subject == _CHOICE}
    lines = [
        "| method | what depends on the input | built by | MACs | parameters | time, batch 1 | batch 32 | when |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for form in FORMS.values():
        if (form.title, BATCHES[0]) not in own:
            continue
        row, method = own[form.title, BATCHES[0]], form.made()
        page = f"{form.method}.md"
        name = f"[{form.title}]({page})" if (PAGE.parent / page).exists() else form.title
        clock = " | ".join(f"{own[form.title, batch].ratio:.2f}" for batch in BATCHES)
        lines.append(
            f"| {name} | {getattr(method, 'adapts', '')} | {method.sharing} | {row.macs:.3f} | {row.params:.2f} |"
            f" {clock} | {form.choose} |"
        )
    return lines


def _layers(rows: Sequence[Time]) -> list[str]:
    columns = [(shape, batch) for shape in SHAPES for batch in BATCHES]
    heads = " | ".join(f"{shape}, batch {batch}" for shape, batch in columns)
    own = {(row.form, row.subject, row.batch): row for row in rows}
    lines = [f"| one 3x3 layer | {heads} |", f"|---|{'--:|' * len(columns)}"]
    for title in dict.fromkeys(row.form for row in rows):
        cells = (own.get((title, *column)) for column in columns)
        text = " | ".join("" if row is None else f"{row.ratio:.2f} ({row.iqr:.2f})" for row in cells)
        lines.append(f"| {title} | {text} |")
    base = next(iter(FORMS))
    milliseconds = " | ".join(f"{own[(base, *column)].ms:.3g}" for column in columns)
    return [*lines, f"| {base}, ms | {milliseconds} |"]


def _networks(rows: Sequence[Run], timed: Sequence[Time], results: Path) -> list[str]:
    clock = {(row.form, row.batch): row for row in timed}
    heads = "".join(f" time, batch {batch} |" for batch in BATCHES if clock)
    first = rows[0]
    lines = [
        f"| | accuracy, % | seeds | MACs | parameters | banks |{heads}",
        f"|---|--:|--:|--:|--:|--:|{'--:|' * (len(BATCHES) if clock else 0)}",
        f"| original | {100 * first.original_accuracy:.2f} | | {first.original_macs / 1e6:.1f} M |"
        f" {first.original_params / 1e3:.0f} k | |{_clock(clock, 'original')}",
    ]
    for title in (title for title in FORMS if any(row.form == title for row in rows)):
        own = [row for row in rows if row.form == title]
        scores, row = [100 * each.accuracy for each in own], own[0]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        banks = f"{row.bank_bytes / 1e6:.2f} MB" if row.bank_bytes else ""
        lines.append(
            f"| {title} | {statistics.fmean(scores):.2f}{spread} | {len(scores)} |"
            f" {row.macs / row.original_macs:.1%} | {row.params / row.original_params:.2f}x | {banks} |"
            f"{_clock(clock, title)}"
        )
    lines += ["", *_trained(rows)]
    if clock:
        picture = f"../../benchmarks/results/methods/{PICTURE}"
        lines += ["", f"Times: {_origin(results / 'students.json')}", "", f"![{SUBJECT}, all methods]({picture})"]
    return lines


def _clock(clock: Mapping[tuple[str, int], Time], title: str) -> str:
    if not clock:
        return ""
    rows = (clock.get((title, batch)) for batch in BATCHES)
    return "".join(" |" if row is None else f" {row.ratio:.2f} ({row.iqr:.2f}) |" for row in rows)


def _trained(rows: Sequence[Run]) -> Iterator[str]:
    commits = ", ".join(f"`{name}`" for name in dict.fromkeys(row.commit for row in rows) if name)
    seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
    last = max(rows, key=lambda row: row.date)
    targets = ", ".join(dict.fromkeys(f"{row.target} of the MACs, {row.epochs} epochs" for row in rows))
    yield (
        f"Trained: {targets} of distillation, seeds {seeds}, {last.threads} thread; {last.hardware}; {last.versions};"
        f" commit {commits}; until {last.date[:10]}. `python -m benchmarks.methods --data FOLDER --weights FILE`"
    )


def _origin(path: Path) -> str:
    here: dict[str, Any] = json.loads(path.read_text("utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    return (
        f"{here['date'][:10]}, {here['hardware']}, {here['threads']} thread, commit `{here['commit']}`; medians of up"
        f" to {here['rounds']} rounds or {here['seconds']:g} s, interquartile ranges in brackets; {versions}."
        f" `{here['command']}`"
    )
