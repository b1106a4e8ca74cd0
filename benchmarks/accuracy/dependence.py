"""What trained students owe to coefficients that depend on the image, and whether they have learnt all they can.

A student is asked three times: with the coefficients of the image; with those of another image of the batch; with the
mean of what its routers say about training images, which makes it a static network. Its accuracy on training images as
the test shows them, neither shifted nor mirrored, stands beside: where that is no higher, the training is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.jobs import Job, Workshop
from benchmarks.rowstore import RowStore
from benchmarks.trainings import ROOT, STUDENT
from dyncompress.bundle import load
from dyncompress.layers.router import RouterLinear
from dyncompress.recipe import importable

Batch = tuple[Tensor, Tensor]
Change = Callable[[str, Tensor], Tensor]
IMAGES = 5000  # training images


@dataclass(frozen=True)
class Row:
    """One student, in %.

    Attributes:
        network: Key of `NETWORKS`.
        budget: As it was asked for.
        arm: Title of an `Arm`.
        epochs: Of its training.
        seed: Of its training.
        train: Accuracy on training images.
        test: Accuracy on test images.
        swapped: The same with the coefficients of another image; None where there are none.
        mean: The same with mean coefficients; None where there are none.
    """

    network: str
    budget: str
    arm: str
    epochs: int
    seed: int
    train: float
    test: float
    swapped: float | None
    mean: float | None


KEY = ("network", "budget", "arm", "epochs", "seed")
FILE = "dependence.csv"


def store(results: Path) -> RowStore[Row]:
    """The rows in a folder of results."""
    return RowStore(results / FILE, Row, KEY)


def examined(workshop: Workshop, wanted: Sequence[Job]) -> Iterator[Row]:
    """Rows of CIFAR-10 students that are there."""
    here = [job for job in wanted if job.network.data == "cifar10" and (workshop.place(job) / STUDENT).exists()]
    if here:
        train, test = cifar10(workshop.data["cifar10"])
        for job in here:
            yield examine(job, load(workshop.place(job) / STUDENT, job.network.untrained()), train, test)


def cifar10(folder: Path) -> tuple[list[Batch], list[Batch]]:
    """The first training images, and all test images, as the test shows them."""
    with importable(str(ROOT / "recipes")):
        import cifar10 as recipe  # type: ignore[import-not-found]
    data = recipe.Cifar10Data(str(folder))
    data.setup("test")
    train = recipe.Batches(*data.splits["train"], 500, mean=recipe.MEAN, std=recipe.STD)
    return first(train, IMAGES), list(data.test_dataloader())


def examine(job: Job, student: nn.Module, train: Sequence[Batch], test: Sequence[Batch]) -> Row:
    """The row of a student.

    Args:
        job: Which it is.
        student: As trained.
        train: Training images and labels, as the test shows them.
        test: Test images and labels.
    """
    student.eval()
    routers = [name for name, module in student.named_modules() if isinstance(module, RouterLinear)]
    # Of a router with a hidden layer only the last one gives coefficients.
    routers = [name for name in routers if not name.endswith("squeeze.reduce")]
    swapped = mean = None
    if routers:
        constant = means(student, routers, [images for images, _ in train])
        swapped = accuracy(student, test, routers, lambda name, logits: logits.roll(1, 0))
        mean = accuracy(student, test, routers, lambda name, logits: constant[name].expand_as(logits))
    return Row(*job.key, accuracy(student, train), accuracy(student, test), swapped, mean)


def means(net: nn.Module, routers: Iterable[str], batches: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """Mean of what each router says about images: [1, coefficients]."""
    sums: dict[str, Tensor] = {}

    def add(name: str, logits: Tensor) -> Tensor:
        sums[name] = sums.get(name, torch.zeros(())) + logits.double().sum(0, keepdim=True)
        return logits

    with torch.inference_mode(), changed(net, routers, add):
        for images in batches:
            net(images)
    count = sum(len(images) for images in batches)
    return {name: total / count for name, total in sums.items()}


def accuracy(
    net: nn.Module, batches: Sequence[Batch], routers: Iterable[str] = (), change: Change | None = None
) -> float:
    """Of images, in %, where ``change(name, logits)`` replaces what routers say."""
    with torch.inference_mode(), changed(net, routers, change or (lambda name, logits: logits)):
        right = [net(images).argmax(1) == labels for images, labels in batches]
    return 100 * torch.cat(right).double().mean().item()


@contextmanager
def changed(net: nn.Module, routers: Iterable[str], change: Change) -> Iterator[None]:
    """Within the context routers say what a function makes of it."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, given, logits: change(name, logits).to(logits.dtype)

    handles = [net.get_submodule(name).register_forward_hook(hook(name)) for name in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(batches: Iterable[Batch], images: int) -> list[Batch]:
    """Batches from the front, as few as hold so many images."""
    kept: list[Batch] = []
    for batch in batches:
        if sum(len(labels) for _, labels in kept) >= images:
            break
        kept.append(batch)
    return kept


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as Markdown, in the order of their comparisons."""
    yield "| budget | epochs | arm | seed | training images | test images | with another's | with their mean |"
    yield "|---|--:|---|--:|--:|--:|--:|--:|"
    for row in sorted(rows, key=lambda row: (row.network, row.epochs, row.budget, list(ARMS).index(row.arm), row.seed)):
        told = " | ".join("" if value is None else f"{value:.2f}" for value in (row.swapped, row.mean))
        yield (f"| {row.budget} | {row.epochs} | {row.arm} | {row.seed} | {row.train:.2f} | {row.test:.2f} | {told} |")
