"""docs/reliability.md: every promise of tests/trust with what its test measured last.

A promise is the docstring of its test; a figure is what the test recorded. The page is a pure function of the tests'
text and of the results, so a promise can't stand there without a test, nor a figure without a run.

    make trust      # runs them all, slow ones included, and writes results and page
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dyncompress.provenance import Environment

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests/trust"
RESULTS = ROOT / "benchmarks/results/reliability.json"
MATRIX = ROOT / "benchmarks/results/matrix.json"
PAGE = ROOT / "docs/reliability.md"
_CASES = 6  # figures of a parametrised test that are shown one by one
_INTRODUCTION = """\
# What you can rely on

Each line is a promise, and behind it stands a test; the figure is what the test measured when it ran last. `make trust`
runs them all, the slow ones too, and writes this page; `make test` runs the fast ones with every change."""

_LIMITS = """\
## What is not promised

- **Untried:** FSDP1 (Lightning refuses it on a CPU), DeepSpeed, NCCL, several machines, a notebook's own kernel (the
  `ddp_notebook` strategy is tried in a script), Windows, macOS, Python 3.10, 3.12 and later. Tests marked for a GPU are
  written and have not run.
- FSDP2 synchronises parameters, not BatchNorm statistics: each process keeps its own, with or without compression.
  Lightning cannot consolidate the sharded folders of its ModelParallelStrategy; save with
  `save_distributed_checkpoint=False` where one file is wanted.
- `fit(ckpt_path=)` is read by Lightning itself, before 2.6 with pickle: there, a checkpoint of unknown origin goes
  through `dyncompress.load` or `dyncompress.load_from_checkpoint`, which read weights only.
- torch 2.4 counts nothing under `inference_mode`, and has no derivative of `channel_shuffle`.
- Archives that torch wrote without checksums, and its format of before 1.6, carry nothing to compare a flipped bit
  with.
- On a GPU the loss is looked at in every `log_every_n_steps`-th step, so that a NaN may train until then.
- With `save_teacher=True` and a precision of 16 bits throughout, the teacher is saved in 16 bits.
- How often a layer runs, for its cost, is read from a plan's file as it stands there: only a run of the network could
  tell.
- On Windows what a killed process left beside a file stays there.
"""


@dataclass(frozen=True)
class Promise:
    """One test, as its text has it."""

    file: str
    name: str
    text: str
    slow: bool
    gpu: bool


def sections(folder: Path = TESTS) -> dict[str, tuple[str, list[Promise]]]:
    """Heading and promises by file, in the order in which they stand.

    Raises:
        ValueError: If a test or a file says nothing.
    """
    found = {}
    for path in sorted(folder.glob("test_*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        heading = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".")
        tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        whole = _marks(
            next((n for n in tree.body if isinstance(n, ast.Assign) and "pytestmark" in ast.unparse(n)), None)
        )
        promises = []
        for test in tests:
            marks = whole | {mark for decorator in test.decorator_list for mark in _marks(decorator)}
            text = " ".join((ast.get_docstring(test) or "").split()).rstrip(".")
            promises.append(Promise(path.stem, test.name, text, "slow" in marks, "gpu" in marks))
        dumb = [promise.name for promise in promises if not promise.text]
        if dumb or not heading:
            raise ValueError(f"{path.name}: no docstring in {dumb or 'the file'}; it is what the page promises")
        found[path.stem] = (heading, promises)
    return found


def _marks(node: ast.AST | None) -> set[str]:
    return set(re.findall(r"mark\.(slow|gpu)\b", ast.unparse(node))) if node is not None else set()


def outcomes(*junit: Path) -> dict[str, list[dict[str, Any]]]:
    """What pytest wrote with ``--junit-xml``, by "file::test": a row for each case, of the last run that had it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in (case for file in junit for case in ElementTree.parse(file).iter("testcase")):
        if ".trust." not in case.get("classname", ""):
            continue
        name, _, parameters = case.get("name", "").partition("[")
        tags = {child.tag for child in case}
        status = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        figures = [p.get("value", "") for p in case.iter("property") if p.get("name") == "figure"]
        row = {
            "case": parameters.removesuffix("]"),
            "status": status,
            "figure": "; ".join(figures),
            "seconds": round(float(case.get("time", 0)), 1),
        }
        found.setdefault(f"{case.get('classname', '').rpartition('.')[2]}::{name}", {})[row["case"]] = row
    return {test: list(rows.values()) for test, rows in found.items()}


def render(promised: dict[str, tuple[str, list[Promise]]], results: dict[str, Any], matrix: dict[str, Any]) -> str:
    """The page.

    Args:
        promised: From `sections`.
        results: As `main` writes them: ``tests`` by "file::test", ``coverage``, ``mutants``, ``provenance``.
        matrix: As ``make matrix`` writes it; empty where it never ran.

    Returns:
        Markdown.
    """
    return "\n".join([_INTRODUCTION, "", *_promises(promised, results), *_versions(matrix), *_tests(results), _LIMITS])


def _promises(promised: dict[str, tuple[str, list[Promise]]], results: dict[str, Any]) -> Iterator[str]:
    rows = [promise for _, promises in promised.values() for promise in promises]
    kept = sum(_status(results, promise) == "passed" for promise in rows)
    yield f"{len(rows)} promises, {kept} kept in the last run" + _when(results, "trust") + "."
    yield ""
    for file, (heading, promises) in promised.items():
        yield from (f"## {heading}", "", f"Tests: [tests/trust/{file}.py](../tests/trust/{file}.py)", "")
        yield from ("| promise | last measured |", "|---|---|")
        for promise in promises:
            yield f"| {_cell(promise.text)}{' (slow)' * promise.slow} | {_cell(_figure(results, promise))} |"
        yield ""


def _status(results: dict[str, Any], promise: Promise) -> str:
    found = {row["status"] for row in results.get("tests", {}).get(f"{promise.file}::{promise.name}", [])}
    return next((status for status in ("failed", "passed", "skipped") if status in found), "not run")


def _figure(results: dict[str, Any], promise: Promise) -> str:
    status = _status(results, promise)
    if status in ("not run", "skipped"):
        return "**not run: needs a GPU**" if promise.gpu else f"**{status}**"
    rows = [row for row in results["tests"][f"{promise.file}::{promise.name}"] if row["status"] == "passed"]
    said = [f"{row['case']}: {row['figure']}" if row["case"] else row["figure"] for row in rows if row["figure"]]
    if len({row["figure"] for row in rows}) == 1 and said:
        said = [rows[0]["figure"]]
    more = f"; and {len(said) - _CASES} more" if len(said) > _CASES else ""
    kept = f"kept in {len(rows)} cases" if len(rows) > 1 else "kept"
    return "**broken**" if status == "failed" else "; ".join(said[:_CASES]) + more or kept


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _versions(matrix: dict[str, Any]) -> Iterator[str]:
    if matrix.get("environments"):
        yield from ("## Versions", "", "`make matrix` runs the tests in environments of their own:", "")
        yield from ("| environment | versions | passed | failed | skipped |", "|---|---|--:|--:|--:|")
        for each in matrix["environments"]:
            versions = ", ".join(f"{name} {number}" for name, number in each["versions"].items())
            yield f"| {each['name']} | {versions} | {each['passed']} | {each['failed']} | {each['skipped']} |"
        yield ""


def _tests(results: dict[str, Any]) -> Iterator[str]:
    yield from ("## The tests themselves", "")
    if found := results.get("coverage"):
        yield f"- `make coverage`: {found['lines']:.1%} of lines, {found['branches']:.1%} of branches" + (
            f"{_when(results, 'coverage')}. Lines that only child processes run are not seen."
        )
    if found := results.get("mutants"):
        tried = found["killed"] + found["survived"]
        yield (
            f"- `make mutants` (mutmut, on plan, cost and budget): {found['killed']} of {tried} mutants killed"
            f" ({found['killed'] / tried:.1%}){_when(results, 'mutants')}; {found.get('left', 0)} more were not"
            " tried. Properties are not mutated."
        )
    yield ""


def _when(results: dict[str, Any], run: str) -> str:
    here = results.get("provenance", {}).get(run)
    if here is None:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    return f" ({here['date'][:10]}, {here['hardware']}; {versions})" if run == "trust" else f" ({here['date'][:10]})"


def _coverage(file: Path) -> dict[str, float]:
    """Shares from ``coverage json``."""
    totals = json.loads(file.read_text("utf-8"))["totals"]
    return {
        "lines": totals["covered_lines"] / totals["num_statements"],
        "branches": totals["covered_branches"] / totals["num_branches"],
    }


def _mutants(file: Path) -> dict[str, int]:
    """Counts from ``mutmut results --all true``: one "name: verdict" a line."""
    verdicts = re.findall(r"^\s+\S+: (.+)$", file.read_text("utf-8"), re.M)
    caught = ("killed", "timeout", "segfault", "suspicious")
    missed = ("survived", "no tests")
    killed, survived = sum(v in caught for v in verdicts), sum(v in missed for v in verdicts)
    return {"killed": killed, "survived": survived, "left": len(verdicts) - killed - survived}


def read(file: Path) -> dict[str, Any]:
    """Results of before; empty where there are none."""
    return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def main() -> None:
    """Take over what is given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trust", type=Path, nargs="+", help="what pytest --junit-xml wrote")
    parser.add_argument("--coverage", type=Path, nargs=1, help="what coverage json wrote")
    parser.add_argument("--mutants", type=Path, nargs=1, help="what mutmut results --all true printed")
    given = parser.parse_args()
    results = read(RESULTS)
    for run, key, take in (
        ("trust", "tests", outcomes),
        ("coverage", "coverage", _coverage),
        ("mutants", "mutants", _mutants),
    ):
        if (files := getattr(given, run)) is not None:
            results[key] = take(*files)
            results.setdefault("provenance", {})[run] = asdict(Environment.here([]))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    PAGE.write_text(render(sections(), results, read(MATRIX)), "utf-8")


if __name__ == "__main__":
    main()
