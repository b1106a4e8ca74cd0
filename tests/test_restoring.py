"""Whose plan decides, and when it is too late for another one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dyncompress.conversion import convert_, plan_of
from dyncompress.errors import CheckpointError
from dyncompress.planning import make_plan
from dyncompress.restoring import follow, plans_of, refuse_other_plan
from dyncompress.student import Student
from tests.classifiers import Net, equal, weights

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


def converted(target: str = "50%") -> Holder:
    holder = Holder()
    convert_(holder.net, make_plan(holder.net, EXAMPLE, target))
    return holder


def host(late: bool = False) -> Any:
    strategy = SimpleNamespace(restore_checkpoint_after_setup=late)
    return SimpleNamespace(strategy=strategy, callbacks=[], state=SimpleNamespace(fn="fit"))


def test_plans_are_found_where_the_checkpoint_keeps_them() -> None:
    module = converted()
    plan = plan_of(module)
    assert plan is not None
    assert plans_of({"state_dict": module.state_dict()}, Holder(), None) == {"net.": plan}
    sharded = {"callbacks": {"DynCompress": {"plan": plan.to_json()}, "Other": {}}}
    assert plans_of(sharded, Holder(), None) == {"net.": plan}
    assert plans_of({"callbacks": {}}, Holder(), None) == {}
    assert plans_of({"state_dict": Holder().state_dict()}, Holder(), None) == {}
    with pytest.raises(CheckpointError, match="holds no plan"):
        plans_of({"state_dict": Holder().state_dict()}, module, None)


def test_the_same_plan_changes_nothing_and_another_rebuilds() -> None:
    module = Holder()
    student = Student("net", module.net)
    student.convert(make_plan(module.net, EXAMPLE, "50%"), seed=0)
    before, other = weights(module), plan_of(converted("35%"))
    assert student.plan is not None
    assert other is not None
    follow({"net.": student.plan}, host(late=True), module, student, None, 0)
    assert equal(module, before)
    follow({"net.": other}, host(), module, student, None, 0)
    assert plan_of(module) == other


@pytest.mark.parametrize(
    ("late", "keeps_copy", "trained", "reason"),
    [
        (True, False, False, "SimpleNamespace has split the module"),
        (False, True, False, "SimpleNamespace has copied the module"),
        (False, False, True, "the original is gone"),
    ],
)
def test_when_it_is_too_late_the_reason_is_told(late: bool, keeps_copy: bool, trained: bool, reason: str) -> None:
    module, other = Holder(), plan_of(converted("35%"))
    assert other is not None
    student = Student("net", module.net)
    student.convert(make_plan(module.net, EXAMPLE, "50%"), seed=0)
    if trained:
        student.settle()
    trainer = host(late)
    if keeps_copy:
        trainer.callbacks = [SimpleNamespace(copy=Holder())]
    before = weights(module)
    with pytest.raises(CheckpointError, match=rf"\(35%, auto\) differs .* {reason}, .* pass plan="):
        follow({"net.": other}, trainer, module, student, None, 0)
    assert equal(module, before)


def test_other_shapes_are_refused_before_they_are_loaded_into_pieces(tmp_path: Path) -> None:
    module = converted()
    plan = plan_of(module)
    assert plan is not None
    file, folder, foreign = tmp_path / "a.ckpt", tmp_path / "sharded", tmp_path / "foreign"
    torch.save({"state_dict": module.state_dict()}, file)
    folder.mkdir()
    foreign.mkdir()  # of a strategy with a format of its own
    torch.save({"callbacks": {"DynCompress": {"plan": plan.to_json()}}}, folder / "meta.pt")
    for path in (file, folder):
        refuse_other_plan(host(), module, path)
        for holder in (converted("35%"), Holder()):
            with pytest.raises(CheckpointError, match="SimpleNamespace has split the module"):
                refuse_other_plan(host(), holder, path)
    for path in (foreign, tmp_path / "missing.ckpt", "s3://bucket/a.ckpt"):
        refuse_other_plan(host(), Holder(), path)
