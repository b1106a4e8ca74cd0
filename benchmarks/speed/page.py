"""docs/speed.md: a pure function of the CSVs and of the JSONs beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.speed import plots
from benchmarks.speed.goals import Verdict, judge, verdicts
from benchmarks.speed.rows import Section, read
from benchmarks.speed.tables import TABLES
from dyncompress import files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/speed"
PAGE = ROOT / "docs/speed.md"
_INTRODUCTION = """\
# How fast is it?

`make bench` measures this and writes this page. All arms of a comparison take turns within a round, there and back
(A B C C B A), since a shared machine drifts by more than they differ; a ratio is the median of those within a round,
the number in brackets their interquartile range, `n` the rounds. Differences below that range mean nothing.

**original**: the network as it is. **dynamic**: its student, of the MACs that the table tells. **static**: a network of
the student's widths with one kernel per channel: what cutting channels alone would give, and the least that a dynamic
network of those widths can take. Weights and inputs are random, BatchNorm has the statistics of what it sees.
"""
_TITLES = {
    "networks": ("Networks", "Inference in eager PyTorch, BatchNorm folded in all three."),
    "training": ("Training", "Forward, cross-entropy, backward, SGD with momentum; BatchNorm in training mode."),
    "layers": (
        "Layers",
        "One layer with a predictor of its own: ours (`dynet`, g = 4), timm's CondConv (4 experts), and ODConv and"
        " KernelWarehouse (four layers share a warehouse) as their authors publish them.",
    ),
    "pruning": ("Beside torch-pruning", "The same network pruned to the student's MACs."),
    "planning": ("Planning", "Tracing is part of `make_plan`."),
    "distillation": (
        "Distillation",
        "What a teacher adds to a training step (batch 32), beyond its own forward pass.",
    ),
    "deployment": ("Deployment", "Exported by `dyncompress.export` and run by onnxruntime on the CPU, batch 1."),
}


def render(sections: Mapping[str, Section]) -> str:
    """The page.

    Args:
        sections: As `benchmarks.speed.rows.read` returns them.
    """
    lines = [_INTRODUCTION, *_goals(list(verdicts(sections)), sections)]
    for name, (title, text) in _TITLES.items():
        for key in (k for k in sections if k == name or k.startswith(f"{name}-")):
            lines += _section(sections[key], title + key.removeprefix(name).replace("-", ", ").upper(), text, name)
    return "\n".join(lines).rstrip() + "\n"


def publish(results: Path, page: Path) -> Iterator[Path]:
    """Draw the plots and write the page; yields what was written."""
    sections = read(results)
    for section in sections.values():
        figure = plots.draw(section)
        if figure is not None:
            path = results / f"{section.name}.png"
            figure.savefig(path)
            yield path
    if sections:
        files.write_text(page, render(sections))
        yield page


def _goals(found: list[Verdict], sections: Mapping[str, Section]) -> Iterator[str]:
    if not found:
        return
    missed = [verdict for verdict in found if not verdict.met]
    yield "## Goals"
    yield ""
    yield f"{len(found) - len(missed)} of the {len(found)} goals that were measured are met, on the CPU and in fp32."
    yield ""
    if missed:
        yield "Missed:"
        yield ""
        for v in missed:
            floor = (
                judge(replace(v.goal, base="static"), sections[v.goal.section].rows)
                if v.goal.base == "dynamic"
                else None
            )
            least = f" The static network of these widths: {_number(floor.value)}." if floor else ""
            yield f"- {v.goal.text}: {_number(v.value)}, and {_limit(v)} was asked.{least}"
        yield ""
    yield "| goal | asked | measured | spread | n | |"
    yield "|---|--:|--:|---|--:|---|"
    for v in found:
        verdict = "met" if v.met else "**missed**"
        n = "" if v.n is None else v.n
        yield f"| {v.goal.text} | {_limit(v)} | {_number(v.value)} | {v.spread} | {n} | {verdict} |"
    yield ""


def _limit(verdict: Verdict) -> str:
    return f"{'≥' if verdict.goal.at_least else '≤'} {_number(verdict.goal.limit)}"


def _number(value: float) -> str:
    return f"{value:.4g}" if value >= 0.01 else f"{value:.0e}"


def _section(section: Section, title: str, text: str, kind: str) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield text
    yield ""
    yield from TABLES[kind](section.rows)
    if section.rows and plots.has(kind):
        yield f"![{title}](../benchmarks/results/speed/{section.name}.png)"
        yield ""
    yield _provenance(section)
    yield ""


def _provenance(section: Section) -> str:
    here = section.provenance
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    threads = f"{here['threads']} thread" + "s" * (here["threads"] != 1)
    return (
        f"{here['date'][:10]}, {here['hardware']}, {threads}, allocator: {here['allocator']}; seed {here['seed']}, up"
        f" to {here['rounds']} rounds or {here['seconds']:g} s a comparison; {versions}. `{here['command']}`"
    )
