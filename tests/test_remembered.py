"""A teacher that remembers gives the answers that it gave, and is not asked twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.remembered import remember
from dyncompress import distillation
from dyncompress.distillation import Teacher


class Counting(nn.Module):
    """Twice its input; counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.scale * x


def test_equal_questions_are_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation.Teacher, "answer", distillation.Teacher.answer)
    remember(tmp_path)
    network = Counting()
    teacher, x = Teacher(network), torch.randn(2, 3)
    first, again, other = (teacher.answer((images,), {})[0] for images in (x, x.clone(), x + 1))
    assert network.runs == 2 and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(first, 2 * x) and torch.equal(again, first) and torch.equal(other, 2 * (x + 1))


def test_another_teacher_is_asked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation.Teacher, "answer", distillation.Teacher.answer)
    remember(tmp_path)
    x, network = torch.randn(2, 3), Counting()
    nn.init.constant_(network.scale, 3.0)
    assert torch.equal(Teacher(Counting()).answer((x,), {})[0], 2 * x)
    assert torch.equal(Teacher(network).answer((x,), {})[0], 3 * x)


def test_features_are_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation.Teacher, "answer", distillation.Teacher.answer)
    remember(tmp_path)
    network = nn.Sequential(Counting())
    for _ in range(2):
        answer, features = Teacher(network).answer((torch.ones(1),), {}, ["0"])
        assert answer.item() == features["0"].item() == 2
    assert network[0].runs == 2
