"""What dependence on the input is worth in a short training: kinds of attention around a narrowed network's layers.

    python -m benchmarks.screening --data FOLDER --weights FILE.pt            # kinds that have no row yet
    python -m benchmarks.screening                                            # the table of what is there

CIFAR-10 ResNet-20, narrowed to static widths and fitted to the original by ridge; then each 3x3 convolution of a block
is wrapped, and all are distilled alike on the same batches. A wrapper's pooling and router are not counted, and it may
be of a kind that no method of dyncompress has: this is where to look before one is built. FOLDER holds train.parquet
and test.parquet (``recipes/cifar10.py``). One thread; minutes a row.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from benchmarks.rowstore import RowStore
from benchmarks.trainings import ROOT, commit
from dyncompress.allocator import keep_freed_memory
from dyncompress.checkpoint import load_weights
from dyncompress.losses import logit_loss
from dyncompress.recipe import importable

RESULTS = ROOT / "benchmarks/results/screening.csv"
BATCH, BATCHES, HIDDEN, TEMPERATURE, DECAY = 128, 8, 16, 4.0, 5e-4
KINDS = {
    "static": "",
    "in, out": "io",
    "in, out, shift": "ios",
    "in, out; 4x4 pooled": "io4",
    "in, out; normalised": "ion",
}
KEY = ("kind", "target", "epochs", "lr", "router_lr", "seed")


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        kind: Key of `KINDS`.
        target: Share of the original's MACs, wrappers not counted.
        epochs: Of distillation.
        lr: Peak of one learning-rate cycle.
        router_lr: Times this for the wrappers' own weights, which have no weight decay unless it is 1.
        seed: Of batches and wrappers.
        accuracy: On the test images, in %.
        params: Of the student.
        commit: Of this repository.
    """

    kind: str
    target: str
    epochs: int
    lr: float
    router_lr: float
    seed: int
    accuracy: float = 0.0
    params: int = 0
    commit: str = ""


class Attention(nn.Module):
    """``(1 + tanh f) * conv((1 + tanh c) * x) + s``; c, f, s linear in relu(U pool(x) + u), and 0 at first.

    Args:
        conv: What is wrapped.
        parts: Which of c (``"i"``), f (``"o"``), s (``"s"``) there are; ``"4"`` pools to 4x4 instead of 1x1; ``"n"``
            normalises what is pooled over the images, whose differences are small beside their mean.
    """

    def __init__(self, conv: nn.Conv2d, parts: str) -> None:
        super().__init__()
        self.conv, self.pooled = conv, 4 if "4" in parts else 1
        self.sizes = [conv.in_channels * ("i" in parts), *(conv.out_channels * (part in parts) for part in "os")]
        features = conv.in_channels * self.pooled**2
        self.normal = nn.BatchNorm1d(features, affine=False) if "n" in parts else nn.Identity()
        self.hidden = nn.Linear(features, HIDDEN)
        self.router = nn.Linear(HIDDEN, sum(self.sizes))
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']."""
        pooled = self.normal(F.adaptive_avg_pool2d(x, self.pooled).flatten(1))
        read, scale, shift = self.router(F.relu(self.hidden(pooled)))[..., None, None].split(self.sizes, 1)
        out: Tensor = self.conv(x * (1 + torch.tanh(read)) if self.sizes[0] else x)
        out = out * (1 + torch.tanh(scale)) if self.sizes[1] else out
        return out + shift if self.sizes[2] else out


def trained(row: Row, net: nn.Module, data: Any) -> Row:
    """The row with its result.

    Args:
        row: What is asked for.
        net: The original.
        data: The recipe's data module, set up.
    """
    torch.manual_seed(row.seed)  # of the batches, too: the data module reads it
    plan = dc.make_plan(net, torch.zeros(1, 3, 32, 32), row.target, method="static")
    some = [images for images, _ in itertools.islice(data.train_dataloader(), BATCHES)]
    student: Any = dc.convert(net, plan, calibrate=some, seed=row.seed)
    own: list[nn.Parameter] = []
    for block in (block for stage in (student.layer1, student.layer2, student.layer3) for block in stage):
        for name in ("conv1", "conv2") if KINDS[row.kind] else ():
            wrapper = Attention(getattr(block, name), KINDS[row.kind])
            own += [*wrapper.hidden.parameters(), *wrapper.router.parameters()]
            setattr(block, name, wrapper)
    student.to(memory_format=torch.channels_last)
    rest = [p for p in student.parameters() if all(p is not other for other in own)]
    groups = [(rest, row.lr, DECAY), (own, row.lr * row.router_lr, DECAY * (row.router_lr == 1))]
    optimizer = torch.optim.SGD(
        [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in groups if params],
        momentum=0.9,
        nesterov=True,
    )
    loader = data.train_dataloader()
    peaks = [group["lr"] for group in optimizer.param_groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=row.epochs * len(loader))
    student.train()
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader, row.epochs)):
        with torch.no_grad():
            wanted = net(images)
        scores = student(images)
        loss = F.cross_entropy(scores, labels) + logit_loss(scores, wanted, TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    student.eval()
    with torch.no_grad():
        right = [student(images).argmax(1) == labels for images, labels in data.test_dataloader()]
    accuracy = 100 * torch.cat(right).float().mean().item()
    return replace(row, accuracy=accuracy, params=sum(p.numel() for p in student.parameters()), commit=commit())


def main(words: list[str]) -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path)
    add("--weights", type=Path)
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help="; ".join(KINDS))
    add("--target", default="25%")
    add("--epochs", type=int, default=2)
    add("--lr", type=float, default=0.05)
    add("--router-lr", type=float, default=1.0, help="times --lr, for the wrappers' own weights")
    add("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args(words)
    if (given.data is None) != (given.weights is None):
        parser.error("training takes both --data and --weights")
    store = RowStore(RESULTS, Row, KEY)
    if given.data is not None:
        torch.set_num_threads(1)
        keep_freed_memory()
        with importable(str(ROOT / "recipes")):
            from cifar10 import Cifar10Data, ResNet  # type: ignore[import-not-found]
        data, net = Cifar10Data(str(given.data), BATCH), ResNet(20).eval()
        data.setup("fit")
        load_weights(net, given.weights)
        for seed, kind in itertools.product(given.seeds, given.kinds):
            row = Row(kind, given.target, given.epochs, given.lr, given.router_lr, seed)
            if all(any(getattr(row, name) != getattr(there, name) for name in KEY) for there in store.read()):
                store.put([trained(row, net, data)])
    table = Table(*Row.__dataclass_fields__)
    for row in store.read():
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in vars(row).values()))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
