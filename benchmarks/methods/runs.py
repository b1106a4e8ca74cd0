"""One row per finished run: the recipe, driven for one form after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.methods.forms import FORMS, Form
from benchmarks.rowstore import RowStore
from benchmarks.trainings import ROOT, Outcome, command, outcomes, train


@dataclass(frozen=True)
class Run(Outcome):
    """What one training of a form came to.

    Attributes:
        form: Title of a `Form`.
        options: Of the method, as JSON.
    """

    form: str
    options: str


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
        words = {
            "method": form.method,
            "options": json.dumps(dict(form.options)),
            "target": self.target,
            "epochs": self.epochs,
            "seeds": json.dumps(self.seeds),
            "threads": 1,
            "control": "false",
            "wandb": "null",
            "data.root": self.data,
            "baseline.checkpoint": self.weights,
            "out": self.out / form.folder,
        }
        return command(self.recipe, words, self.out / "answers")

    def missing(self, form: Form) -> bool:
        """Whether a seed of a form has no row yet."""
        there = {(run.target, run.epochs, run.seed) for run in finished(self.out, [form])}
        return not {(self.target, self.epochs, seed) for seed in self.seeds} <= there

    def train(self, form: Form) -> int:
        """Run what a form lacks; returns the exit status, and tells what was said in FORM.log beside its folder."""
        return train(self.out / form.folder, self.command(form))


def finished(out: Path, forms: Sequence[Form] | None = None) -> Iterator[Run]:
    """The rows of all finished runs in a folder."""
    for form in FORMS.values() if forms is None else forms:
        for outcome in outcomes(out / form.folder):
            yield Run(**asdict(outcome), form=form.title, options=json.dumps(dict(form.options)))
