"""What students owe to their input: answers with other coefficients, on networks whose answers are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.dependence import Row, examine, first, table
from benchmarks.accuracy.jobs import Job
from benchmarks.accuracy.networks import Case
from dyncompress.layers.router import RouterLinear

JOB = Job(Case("resnet20", "33%", (0,), 4), ARMS["odconv, no taps"], 0)
CLASSES = torch.eye(4)


class Asks(nn.Module):
    """Answers what its router says: the class that the image is of."""

    def __init__(self) -> None:
        super().__init__()
        self.router = RouterLinear(4, 4, bias=False)
        nn.init.eye_(self.router.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 4]."""
        out: Tensor = self.router(x)
        return out


def batches(*labels: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [(CLASSES[own], torch.tensor(own)) for own in labels]


def test_a_network_of_nothing_but_its_router() -> None:
    # Of three training images two are of class 1, and so is the mean; a quarter of the test images is.
    row = examine(JOB, Asks(), batches([1, 1, 3]), batches([0, 1], [2, 3]))
    assert (row.train, row.test, row.swapped, row.mean) == (100, 100, 0, 25)
    assert (row.network, row.budget, row.arm, row.epochs, row.seed) == ("resnet20", "33%", "odconv, no taps", 4, 0)


def test_the_image_behind_lends_its_coefficients() -> None:
    assert examine(JOB, Asks(), batches([1]), batches([0, 0, 2])).swapped == pytest.approx(
        100 / 3
    )  # 0 <- 2, 0 <- 0, 2 <- 0


def test_hooks_are_gone_afterwards() -> None:
    net = Asks()
    examine(JOB, net, batches([1]), batches([0, 1]))
    assert net(CLASSES).equal(CLASSES)


def test_a_static_network_has_no_coefficients() -> None:
    row = examine(JOB, nn.Linear(4, 4), batches([1]), batches([0, 1]))
    assert row.swapped is None and row.mean is None
    assert list(table([row]))[-1].endswith("|  |  |")


def test_the_first_batches_that_hold_so_many_images() -> None:
    assert [len(labels) for _, labels in first(batches([0, 1], [2], [3], [0]), 3)] == [2, 1]


def test_rows_stand_by_epochs_and_budget() -> None:
    rows = [
        Row("resnet20", budget, "dynet", epochs, 0, 1, 2, 3, 4)
        for budget, epochs in (("33%", 12), ("33%", 4), ("25%", 4))
    ]
    assert [line[:12] for line in table(rows)][2:] == ["| 25% | 4 | ", "| 33% | 4 | ", "| 33% | 12 |"]
