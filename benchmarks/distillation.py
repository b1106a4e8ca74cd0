"""Which distillation teaches a narrowed CIFAR-10 ResNet-20 most in a short training: one arm per kind, all else equal.

    python -m benchmarks.distillation --root FOLDER --weights WEIGHTS.pt            # what is missing is trained
    python -m benchmarks.distillation                                               # the table of what is there

Arms of one seed see the same batches from the same start. A finished run is a row of results/distillation.csv, so that
a command that was cut short goes on. FOLDER has train.parquet and test.parquet, as for recipes/cifar10_resnet20.yaml.
"""

from __future__ import annotations

import csv
import statistics
import sys
import warnings
from argparse import ArgumentParser
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dyncompress.callback import DynCompress
from dyncompress.checkpoint import load_weights
from dyncompress.distillation import DistillConfig
from dyncompress.recipe import importable

ROWS = Path(__file__).parent / "results/distillation.csv"
STAGES = ("layer1", "layer2", "layer3")
# Weights and temperatures are those of the papers' CIFAR runs where they have some. Attention: beta = 1000 times the
# mean over the positions (1024, 256, 64) of a map is about 1, 4, 16 times our sum.
ARMS: dict[str, DistillConfig | bool] = {
    "none": False,
    "logits": DistillConfig(),
    "dist": DistillConfig(kind="dist", alpha=2.0),
    "dkd": DistillConfig(kind="dkd", labels=1),
    "dkd, beta 2": DistillConfig(kind="dkd", labels=1, beta=2.0),
    "logits + attention": DistillConfig(features=dict(zip(STAGES, (1.0, 4.0, 16.0), strict=True))),
    "logits + hints": DistillConfig(hints=dict.fromkeys(STAGES, 1.0)),
    "hints": DistillConfig(alpha=0.0, hints=dict.fromkeys(STAGES, 1.0)),
}


@dataclass(frozen=True)
class Run:
    """One training: what tells it from the others, and the share of test images that it gets right."""

    method: str
    target: str
    steps: int
    batch: int
    arm: str
    seed: int
    accuracy: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """All but the result."""
        return (self.method, self.target, self.steps, self.batch, self.arm, self.seed)


def finished() -> list[Run]:
    """The rows that are there."""
    if not ROWS.exists():
        return []
    with ROWS.open(newline="", encoding="utf-8") as file:
        kinds = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Run)}
        return [Run(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def add(run: Run) -> None:
    """One more row."""
    ROWS.parent.mkdir(exist_ok=True)
    new = not ROWS.exists()
    with ROWS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Run)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(run))


def train(run: Run, data: Any, weights: Path) -> Run:
    """Fine-tune the narrowed network as this arm says, and test it."""
    from pytorch_lightning import Trainer

    from cifar10 import Cifar10

    torch.manual_seed(run.seed)
    module = Cifar10(depth=20, lr=0.05)
    load_weights(module.net, weights)
    callback = DynCompress(run.target, method=run.method, distill=ARMS[run.arm], seed=run.seed)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        max_steps=run.steps, callbacks=[callback], accelerator="cpu", devices=1, limit_val_batches=0, **quiet
    )
    torch.manual_seed(run.seed)
    trainer.fit(module, datamodule=data)
    (scores,) = trainer.test(module, datamodule=data, verbose=False)
    return Run(*run.key, accuracy=round(scores["test_acc"], 4))


def show(runs: list[Run]) -> None:
    """Mean and sample standard deviation over the seeds of each setting."""
    console = Console(highlight=False, soft_wrap=True)
    settings: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        settings[run.key[:4]][run.arm].append(100 * run.accuracy)
    for (method, target, steps, batch), arms in settings.items():
        console.print(f"\n{method}, {target} of the MACs, {steps} steps of {batch} images; test accuracy in %")
        for arm, found in sorted(arms.items(), key=lambda item: -statistics.mean(item[1])):
            spread = f"± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            console.print(f"  {arm:20}{statistics.mean(found):7.2f} {spread:8} n = {len(found)}")


def main(words: list[str]) -> None:
    """Train what is missing, where the data are given, and print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.distillation")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--method", default="static")
    parser.add_argument("--target", default="33%")
    parser.add_argument("--steps", type=int, default=390)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    if asked.root is not None and asked.weights is not None:
        warnings.filterwarnings("ignore", ".*(does not have many workers|tensorboard|litmodels).*")
        with importable(str(Path(__file__).parents[1] / "recipes")):
            from cifar10 import Cifar10Data

            data = Cifar10Data(str(asked.root), batch_size=asked.batch)
            for seed in asked.seeds:
                for arm in asked.arms:
                    run = Run(asked.method, asked.target, asked.steps, asked.batch, arm, seed)
                    if run.key not in {done.key for done in finished()}:
                        add(train(run, data, asked.weights))
    show(finished())


if __name__ == "__main__":
    main(sys.argv[1:])
