"""Trainings of a recipe, each in a process and a folder of its own, and what they came to.

A training's folder is that of `dyncompress run`; what was finished there by hand counts as well.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyncompress.report import Report

ROOT = Path(__file__).parents[1]
COMMIT = "commit.txt"  # in a training's folder: whose code it ran
SECONDS = "seconds.txt"  # how long the process took, its measurements included
STUDENT = "student.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What one training came to.

    Attributes:
        target: As it was asked for.
        epochs: Of fine-tuning.
        seed: Of it.
        accuracy: Of the student, on the test set, from 0 to 1.
        macs: Of the student.
        params: Of the student.
        bank_bytes: Of its banks.
        original_accuracy: Of the network before.
        original_macs: Of the network before.
        original_params: Of the network before.
        date: When its report was written.
        commit: Of this repository; empty where it isn't known.
        hardware: What it ran on.
        threads: Of torch.
        versions: Of packages.
        command: What ran.
    """

    target: str
    epochs: int
    seed: int
    accuracy: float
    macs: int
    params: int
    bank_bytes: int
    original_accuracy: float
    original_macs: int
    original_params: int
    date: str
    commit: str
    hardware: str
    threads: int
    versions: str
    command: str


def command(recipe: Path, words: Mapping[str, Any], answers: Path | None = None) -> list[str]:
    """The command line of `dyncompress run`.

    Args:
        recipe: Its YAML file.
        words: What is changed in it, by key.
        answers: Folder of a teacher that remembers; None for one that does not.
    """
    program = ["dyncompress"] if answers is None else ["benchmarks.remembered", str(answers)]
    options = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", *program, "run", str(recipe), *options]


def train(folder: Path, words: Sequence[str]) -> int:
    """Run a command that works in a folder; returns the exit status, and tells what was said in FOLDER.log."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / COMMIT).exists():
        (folder / COMMIT).write_text(commit() + "\n", "utf-8")
    started = time.monotonic()
    code = logged(words, folder.with_name(f"{folder.name}.log"))
    if not code:
        (folder / SECONDS).write_text(f"{time.monotonic() - started:.0f}\n", "utf-8")
    return code


def logged(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run a command at the root of the repository, what it says into a file; returns its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(
            list(words), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode


def outcomes(folder: Path) -> Iterator[Outcome]:
    """One per seed that is finished in a folder."""
    if not (folder / "report.json").exists():
        return
    report = Report.load(folder)
    student, original, environment = report.student, report.original, report.environment
    for seed, accuracy in student.score.seeds:
        yield Outcome(
            target=report.target,
            epochs=report.epochs or 0,
            seed=seed,
            accuracy=accuracy,
            macs=student.macs,
            params=student.params,
            bank_bytes=student.bank_bytes,
            original_accuracy=original.score.mean or 0.0,
            original_macs=original.macs,
            original_params=original.params,
            date=environment.date,
            commit=_text(folder / COMMIT),
            hardware=environment.hardware,
            threads=environment.threads,
            versions=", ".join(f"{name} {number}" for name, number in environment.versions.items()),
            command=f"dyncompress run {report.name} --method {student.method} --target {report.target}",
        )


def seconds(folder: Path) -> float | None:
    """How long a folder's training took, where that is known."""
    text = _text(folder / SECONDS)
    return float(text) if text else None


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def _text(path: Path) -> str:
    return path.read_text("utf-8").strip() if path.exists() else ""
