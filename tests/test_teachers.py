"""A list of teachers is checked, loaded, saved and resumed as one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dyncompress.callback import DynCompress
from dyncompress.distillation import Ensemble, Teacher
from dyncompress.errors import CheckpointError, DistillationError
from dyncompress.student import Student
from dyncompress.teachers import load_teacher
from tests.classifiers import Net, classifier, fit

Classifier = classifier()


def fresh(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Classifier()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (7, "teacher 7 is neither a file of weights nor a network; give a path, a network, or a list"),
        ([Net(), None], "teacher None is neither a file of weights nor a network"),
        ([], "teacher is an empty list; leave it out for the original"),
    ],
)
def test_what_cannot_teach_is_refused_before_training(teacher: Any, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        DynCompress("50%", teacher=teacher)


def test_files_and_networks_stand_side_by_side(tmp_path: Path) -> None:
    torch.save(fresh(1).state_dict(), tmp_path / "one.pt")
    original, other = fresh(0).net, Net(width=24)
    teacher = load_teacher([tmp_path / "one.pt", other], Student("net", original))
    assert isinstance(teacher.network, Ensemble)
    first, second = teacher.network.networks
    assert first is not original and second is not other
    assert torch.equal(first.conv1.weight, fresh(1).net.conv1.weight)
    assert torch.equal(second.conv1.weight, other.conv1.weight)
    assert original.conv1.weight.requires_grad and other.conv1.weight.requires_grad  # copies were frozen
    assert load_teacher([original], Student("net", original)).fingerprint == Teacher(fresh(0).net).fingerprint
    with pytest.raises(CheckpointError, match="there is no file"):
        load_teacher([other, tmp_path / "missing.pt"], Student("net", original))


def test_several_teachers_resume_as_one_does(tmp_path: Path) -> None:
    def several() -> list[Any]:
        return [fresh(0).net, fresh(2).net]

    host = fit(fresh(), callback := DynCompress("50%", teacher=several(), save_teacher=True))
    host.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["DynCompress"]
    assert state["teacher"] == Teacher(Ensemble(several())).fingerprint
    assert {name.split(".")[1] for name in state["teacher_weights"]} == {"0", "1"}

    whole, parts = fresh(), fresh()
    fit(whole, DynCompress("50%", teacher=several()), max_epochs=2)
    fit(parts, DynCompress("50%", teacher=several()), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.allclose(value.float(), parts.state_dict()[name].float(), atol=1e-6), name

    host = fit(callback_module := fresh(), callback, max_epochs=1)  # of a callback that goes on to another module
    assert host.callback_metrics["distill/loss"] > 0
    again = fit(callback_module, DynCompress("50%", teacher=several()), max_epochs=2)  # converted already
    assert again.callback_metrics["distill/loss"] > 0
    with pytest.raises(DistillationError, match="the network is converted already"):
        fit(callback_module, DynCompress("50%", teacher=[fresh().net, tmp_path / "one.pt"]))


def test_one_saved_teacher_does_not_become_several(tmp_path: Path) -> None:
    fit(fresh(), DynCompress("50%", save_teacher=True)).save_checkpoint(tmp_path / "last.ckpt")
    several = DynCompress("50%", teacher=[fresh().net, fresh(2).net])
    fit(fresh(), several, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")  # named, so taken and told
    assert isinstance(several._teacher.network, Ensemble)  # type: ignore[union-attr]
