"""One row per finished run: the recipe, driven for one form after the other, each in a process and a folder of its own.

A run's folder is that of `dyncompress run`; what was finished there by hand counts as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.methods.forms import FORMS, Form
from benchmarks.rowstore import RowStore
from dyncompress.report import Report

ROOT = Path(__file__).parents[2]
COMMIT = "commit.txt"  # in a run's folder: whose code it ran
STUDENT = "student.safetensors"


@dataclass(frozen=True)
class Run:
    """What one training came to.

    Attributes:
        form: Title of a `Form`.
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
        options: Of the method, as JSON.
        date: When its report was written.
        commit: Of this repository; empty where it isn't known.
        hardware: What it ran on.
        threads: Of torch.
        versions: Of packages.
        command: What ran.
    """

    form: str
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
    options: str
    date: str
    commit: str
    hardware: str
    threads: int
    versions: str
    command: str


KEY = ("form", "target", "epochs", "seed")


def store(path: Path) -> RowStore[Run]:
    """The rows in a CSV."""
    return RowStore(path, Run, KEY)


@dataclass(frozen=True)
class Request:
    """How forms are trained.

    Attributes:
        data: Folder of the data set.
        weights: Of the original.
        out: Folder of the runs' folders.
        target: Of all.
        epochs: Of fine-tuning.
        seeds: One student each.
        recipe: Which network.
    """

    data: Path
    weights: Path
    out: Path
    target: str = "33%"
    epochs: int = 4
    seeds: tuple[int, ...] = (0,)
    recipe: Path = ROOT / "recipes/cifar10_resnet20.yaml"

    def command(self, form: Form) -> list[str]:
        """The command line of a form's run."""
        return [
            *(sys.executable, "-m", "benchmarks.remembered", str(self.out / "answers"), "run", str(self.recipe)),
            *("--method", form.method, "--options", json.dumps(dict(form.options)), "--target", self.target),
            *("--epochs", str(self.epochs), "--seeds", json.dumps(self.seeds), "--threads", "1"),
            *("--control", "false", "--wandb", "null", "--data.root", str(self.data)),
            *("--baseline.checkpoint", str(self.weights), "--out", str(self.out / form.folder)),
        ]

    def missing(self, form: Form) -> bool:
        """Whether a seed of a form has no row yet."""
        there = {(run.target, run.epochs, run.seed) for run in finished(self.out, [form])}
        return not {(self.target, self.epochs, seed) for seed in self.seeds} <= there

    def train(self, form: Form) -> int:
        """Run what a form lacks; returns the exit status, and tells what was said in FORM.log beside its folder."""
        folder = self.out / form.folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / COMMIT).exists():
            (folder / COMMIT).write_text(commit() + "\n", "utf-8")
        with folder.with_name(f"{form.folder}.log").open("w", encoding="utf-8") as log:
            return subprocess.run(self.command(form), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode


def finished(out: Path, forms: Sequence[Form] | None = None) -> Iterator[Run]:
    """The rows of all finished runs in a folder."""
    for form in FORMS.values() if forms is None else forms:
        folder = out / form.folder
        if not (folder / "report.json").exists():
            continue
        report, student = Report.load(folder), Report.load(folder).student
        environment, original = report.environment, report.original
        for seed, accuracy in student.score.seeds:
            yield Run(
                form=form.title,
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
                options=json.dumps(dict(form.options)),
                date=environment.date,
                commit=(folder / COMMIT).read_text("utf-8").strip() if (folder / COMMIT).exists() else "",
                hardware=environment.hardware,
                threads=environment.threads,
                versions=", ".join(f"{name} {number}" for name, number in environment.versions.items()),
                command=f"dyncompress run {report.name} --method {form.method} --target {report.target}",
            )


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()
