"""The tests with the oldest and the newest releases that setup.py allows, and with each Lightning package alone.

`make matrix` runs all four, `python -m benchmarks.matrix oldest` one of them. Environments lie in .matrix and are
built again when what they ask for changed; the results are in benchmarks/results/matrix.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from datetime import date
from importlib.metadata import requires
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".matrix"
RESULTS = ROOT / "benchmarks/results/matrix.json"
SHOWN = ("torch", "pytorch-lightning", "lightning", "torchmetrics", "jsonargparse", "wandb", "ptflops", "numpy")
# The zoo's networks are installed for one release of torch.
EVERYTHING = ("tests", "--ignore-glob=*/test_zoo*.py")
PACKAGES = ("tests/trust/test_packages.py",)


@dataclass(frozen=True)
class Environment:
    """One row of the table.

    Attributes:
        title: What it stands for.
        constraints: Lines of a pip constraints file: which releases.
        tests: What pytest is told to run.
        without: Distributions that are taken off again, since dyncompress or lightning itself asks for them.
    """

    title: str
    constraints: tuple[str, ...]
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()


def floors() -> tuple[str, ...]:
    """Every lower bound of setup.py as an exact version: ``torch>=2.4`` is ``torch==2.4``."""
    asked = [Requirement(line) for line in requires("dyncompress") or ()]
    lowest = {
        f"{requirement.name}=={bound.version}"
        for requirement in asked
        if requirement.name != "pytest"  # a tool of ours, and no part of what is promised
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    # Lightning 2.2 imports pkg_resources, which setuptools 81 left behind.
    return (*sorted(lowest), "setuptools<81")


def environments() -> dict[str, Environment]:
    """All of them, by name."""
    published = tuple(line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    return {
        "oldest": Environment("the oldest releases", floors(), EVERYTHING),
        "newest": Environment("the newest releases", (), EVERYTHING),
        "pytorch-lightning": Environment("pytorch-lightning alone", published, PACKAGES, ("lightning",)),
        "lightning": Environment("lightning alone", published, PACKAGES, ("pytorch-lightning",)),
    }


def install(name: str, environment: Environment) -> Path:
    """Its interpreter, in a virtual environment that is made unless it is there as asked."""
    folder = HOME / name
    python, asked, done = folder / "bin/python", folder / "constraints.txt", folder / "installed"
    wanted = "\n".join((*environment.constraints, *(f"# without {gone}" for gone in environment.without))) + "\n"
    if done.exists() and asked.read_text("utf-8") == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True)
    asked.write_text(wanted, "utf-8")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-compile", "-c", str(asked), "setuptools", "-e", f"{ROOT}[test]"]
    subprocess.run(install, check=True)
    if environment.without:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *environment.without], check=True)
    done.touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """What is installed of the packages that the table shows."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
    return {"python": platform.python_version()} | {name: found[name] for name in SHOWN if name in found}


def run(python: Path, tests: tuple[str, ...]) -> dict[str, Any]:
    """Counts, and the names of what failed.

    Warnings are no failures here, as they are in `make test`: those of an old release are its own.
    """
    report = python.parents[1] / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", f"--junitxml={report}"]
    started = time.monotonic()
    ended = subprocess.run([*command, *tests], cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    if not report.exists():
        raise SystemExit(f"pytest ended with {ended.returncode} and wrote no report; its output says why")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = list(suite.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "seconds": round(time.monotonic() - started),
        "failures": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed),
        "skips": sorted({_reason(case) for case in skipped}),
    }


def _reason(case: ElementTree.Element) -> str:
    skipped = case.find("skipped")
    return re.sub(r"\s+", " ", skipped.get("message") or "") if skipped is not None else ""


def main() -> int:
    """Install, run and write down; the number of environments in which something failed."""
    known = environments()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all when none is named")
    names = parser.parse_args().names or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose of {', '.join(known)}")
    failed = 0
    for name in names:
        environment = known[name]
        python = install(name, environment)
        row = {"name": environment.title, "date": date.today().isoformat(), "versions": versions(python)}
        row |= {"tests": environment.tests, **run(python, environment.tests)}
        failed += row["failed"] > 0
        # Read as late as this: another environment may have been tried beside.
        rows = json.loads(RESULTS.read_text("utf-8"))["environments"] if RESULTS.exists() else []
        results = {each["name"]: each for each in [*rows, row]}
        ordered = [results[each.title] for each in known.values() if each.title in results]
        RESULTS.write_text(json.dumps({"environments": ordered}, indent=1) + "\n", "utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main())
