"""Accuracy of CIFAR-10 ResNet-20 at step 0, before any training, by warm start: docs/warm_start.md's tables.

    python -m benchmarks.warmstart --data FOLDER --weights FILE             # options, on test images
    python -m benchmarks.warmstart --data FOLDER --weights FILE --tune      # strength and images, on training images
    python -m benchmarks.warmstart --data FOLDER --weights FILE --dynamics  # zero or fitted, and what either takes
    python -m benchmarks.warmstart --data FOLDER --weights FILE --rankings  # channels by magnitude, or by Taylor scores
    python -m benchmarks.warmstart --page                                   # writes the last one's table into the page

FOLDER holds train.parquet and test.parquet (``recipes/cifar10.py``), FILE the trained network. Rows are written as they
are measured; those that are there are not measured again. One thread.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pyarrow import parquet
from rich.console import Console
from torch import Tensor, nn

import dyncompress as dc
from dyncompress.checkpoint import load_weights
from dyncompress.compensation import WarmStart

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
FIELDS = ("method", "allocation", "target", "start", "strength", "images", "scored", "accuracy")
TARGETS = ("33%", "50%", "25%", "75%")
STARTS = ("kept weights", "plain", "ridge")
DYNAMICS = (*FIELDS, "seconds")
OPTIONS = {"odconv": {"spatial": False}}
RANKINGS = ("importance", *FIELDS)
PAGE, MARK = ROOT / "docs/warm_start.md", "<!-- dynamics -->"
HELD_OUT, CALIBRATION, BATCH = 4000, 1024, 128  # training images: to score on, to calibrate on


class Lab:
    """The data and the network.

    Args:
        data: Folder of the data.
        weights: File of the network.
        scored: Images to score on.
    """

    def __init__(self, data: Path, weights: Path, scored: int) -> None:
        sys.path.insert(0, str(ROOT / "recipes"))
        import cifar10  # not installed: beside the recipes

        self.splits = {
            "train": decoded(data / "train.parquet", HELD_OUT + CALIBRATION),
            "test": decoded(data / "test.parquet", scored),
        }
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (cifar10.MEAN, cifar10.STD))
        self.net = cifar10.ResNet(20).eval()
        load_weights(self.net, weights)
        self.scored = scored

    def batches(self, images: int) -> list[tuple[Tensor, Tensor]]:
        """Training images to calibrate on, none of those held out, and their labels."""
        parts = (HELD_OUT + torch.arange(images)).split(BATCH)
        return [(self._images("train", at), self.splits["train"][1][at]) for at in parts]

    def score(self, net: nn.Module, split: str) -> float:
        """Accuracy in %, on test images, or on training images that were held out."""
        right, chosen = 0, torch.arange(self.scored)
        with torch.no_grad():
            for at in chosen.split(250):
                right += int((net.eval()(self._images(split, at)).argmax(1) == self.splits[split][1][at]).sum())
        return 100 * right / len(chosen)

    def _images(self, split: str, at: Tensor) -> Tensor:
        images = (self.splits[split][0][at].float() - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)


def decoded(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first images (N, 3, 32, 32) of a split, as bytes, and their labels; classes are mixed in the files."""
    table = parquet.read_table(path, columns=["img", "label"]).slice(0, count)
    pixels = [np.asarray(Image.open(io.BytesIO(each["bytes"]))) for each in table["img"].to_pylist()]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(table["label"].to_pylist())


def jobs(tune: bool) -> list[dict[str, Any]]:
    """What is measured: a row each."""
    if tune:
        pairs = [(0.0, 256), (0.01, 256), (0.1, 256), (1.0, 256), (0.1, 128), (0.1, 1024)]
        return [row("static", "uniform", "33%", "ridge", strength, images) for strength, images in pairs]
    names = itertools.product(("uniform", "importance"), ("static", "dynet"), TARGETS, STARTS)
    return [row(method, allocation, target, start) for allocation, method, target, start in names]


def dynamics_jobs() -> list[dict[str, Any]]:
    """What ``--dynamics`` measures: a row each, of which seconds are CPU time of the conversion."""
    names = itertools.product((256, 1024), ("25%", "33%"), ("dynet", "odconv"), ("ridge", "fitted"))
    return [row(method, "uniform", target, start, 0.1, images) for images, target, method, start in names]


def rankings_jobs() -> list[dict[str, Any]]:
    """What ``--rankings`` measures: a row each."""
    names = itertools.product(("25%", "33%", "50%"), ("magnitude", "taylor"))
    return [{"importance": each, **row("static", "uniform", target, "ridge", 0.1, 1024)} for target, each in names]


def dynamics_table(rows: list[dict[str, str]]) -> str:
    """The table of docs/warm_start.md, of what was measured with both starts."""
    found = {(r["target"], r["method"], r["images"], r["start"]): r for r in rows}
    lines = ["| MACs | network | images | zero | fitted | CPU, zero | CPU, fitted |", "|---|---|--:|--:|--:|--:|--:|"]
    for target, method, images, start in found:
        pair = [found.get((target, method, images, each)) for each in ("ridge", "fitted")]
        if start == "ridge" and all(pair):
            cells = [f"{float(r['accuracy']):.1f}" for r in pair if r] + [
                f"{float(r['seconds']):.0f} s" for r in pair if r
            ]
            lines.append(f"| {target.replace('%', ' %')} | {method} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, rows: list[dict[str, str]]) -> str:
    """The page with this table in its place."""
    before, _, after = page.split(MARK)
    return f"{before}{MARK}\n{dynamics_table(rows)}\n{MARK}{after}"


def row(method: str, allocation: str, target: str, start: str, strength: float = 0.1, images: int = 256) -> Any:
    """A row without its accuracy."""
    values = (method, allocation, target, start, strength if start in ("ridge", "fitted") else "", images)
    return dict(zip(FIELDS, values, strict=False))


def accuracy(lab: Lab, job: dict[str, Any], split: str) -> tuple[float, float]:
    """Step-0 accuracy of one job, and seconds of CPU that the conversion took."""
    batches, importance = lab.batches(job["images"]), job.get("importance", "magnitude")
    plan = dc.make_plan(
        lab.net, torch.zeros(1, 3, 32, 32), job["target"], job["method"], allocation=job["allocation"],
        options=OPTIONS.get(job["method"]), importance=importance, batches=batches if importance == "taylor" else None,
    )  # fmt: skip
    calibrate = None if job["start"] == "kept weights" else [images for images, _ in batches]
    start: str | WarmStart = "plain"
    if job["strength"] != "":
        dynamics: Any = "fitted" if job["start"] == "fitted" else "zero"
        start = WarmStart("ridge", strength=job["strength"], dynamics=dynamics)
    began = time.process_time()
    student = dc.convert(lab.net, plan, calibrate=calibrate, warm_start=start)
    seconds = time.process_time() - began
    return lab.score(student, split), seconds


def main() -> None:
    """Measure what is missing and print a line per row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--tune", action="store_true", help="strength and number of images, on held-out training data")
    parser.add_argument("--dynamics", action="store_true", help="dynamics that start at zero, or fitted")
    parser.add_argument("--rankings", action="store_true", help="which channels stay: by magnitude, or Taylor scores")
    parser.add_argument("--page", action="store_true", help="write the table of --dynamics into docs/warm_start.md")
    parser.add_argument(
        "--scored", type=int, default=2000, help=f"images that accuracy is of, at most {HELD_OUT} with --tune"
    )
    given = parser.parse_args()
    if given.page:
        with (RESULTS / "warmstart_dynamics.csv").open(encoding="utf-8") as file:
            PAGE.write_text(with_table(PAGE.read_text("utf-8"), list(csv.DictReader(file))), "utf-8")
        return
    if given.data is None or given.weights is None:
        parser.error("give --data FOLDER and --weights FILE")
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    name, todo, fields = "warmstart.csv", jobs(given.tune), FIELDS
    if given.tune:
        name = "warmstart_tuning.csv"
    if given.dynamics:
        name, todo, fields = "warmstart_dynamics.csv", dynamics_jobs(), DYNAMICS
    if given.rankings:
        name, todo, fields = "warmstart_rankings.csv", rankings_jobs(), RANKINGS
    with (RESULTS / name).open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        measured = ("accuracy", "seconds")
        done = [{key: value for key, value in r.items() if key not in measured} for r in csv.DictReader(file)]
        writer = csv.DictWriter(file, fields)
        if not file.tell():
            writer.writeheader()
        lab = Lab(given.data, given.weights, given.scored)
        for job in todo:
            job["scored"] = given.scored
            if {key: str(value) for key, value in job.items()} in done:
                continue
            found, seconds = accuracy(lab, job, "train" if given.tune else "test")
            job["accuracy"] = f"{found:.2f}"
            if given.dynamics:
                job["seconds"] = f"{seconds:.1f}"
            writer.writerow(job)
            file.flush()
            console.print(*job.values(), sep="  ")


if __name__ == "__main__":
    main()
