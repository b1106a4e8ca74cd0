"""What a recipe compresses is tried out before anything is spent, and whatever is wrong is found there."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from digits import Digits, DigitsData
from dyncompress.errors import CheckpointError, RecipeError, TraceError
from dyncompress.recipe import Baseline, Recipe
from dyncompress.subject import Subject, lightning_of, quiet
from tests.classifiers import classifier

RECIPE = Recipe(
    model={"class_path": "digits.Digits", "init_args": {"widths": [8, 16]}},
    data={"class_path": "digits.DigitsData"},
    target="33%",
)


def test_a_subject_knows_its_network_and_what_it_is_fed() -> None:
    subject = Subject.of(RECIPE)
    assert subject.path == "net" and subject.network(subject.model) is subject.model.net
    (images,) = subject.example
    assert images.shape == (500, 1, 8, 8)  # one test batch
    assert subject.lightning.__name__ == "pytorch_lightning"


def test_the_first_seed_decides_the_weights_that_training_starts_from() -> None:
    def start(*seeds: int) -> torch.Tensor:
        torch.rand(1)
        return Subject.of(replace(RECIPE, seeds=seeds)).model.net.conv.weight

    assert torch.equal(start(3, 4), start(3)) and not torch.equal(start(4), start(3))


def test_one_of_several_networks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class Two(Digits):\n    def __init__(self):\n        super().__init__()\n        self.spare = DigitsNet()\n"
    write(tmp_path, monkeypatch, "two_networks", code)
    recipe = replace(RECIPE, model={"class_path": "two_networks.Two"})
    with pytest.raises(TraceError, match=r"several networks.*net, spare"):
        Subject.of(recipe)
    assert Subject.of(replace(recipe, module="net")).path == "net"
    with pytest.raises(TraceError, match="'nett'"):
        Subject.of(replace(recipe, module="nett"))


def test_student_and_control_cost_the_same() -> None:
    plans = Subject.of(RECIPE).plans()
    assert list(plans) == ["static", "student"]
    assert plans["student"].ratio == pytest.approx(0.33, rel=0.01)
    assert plans["static"].method == "static"
    assert plans["static"].macs_after == pytest.approx(plans["student"].macs_after, rel=0.01)


def test_importance_and_sensitivity_are_measured_on_training_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = replace(RECIPE, allocation="sensitivity", importance="taylor", batches=2, target="40%, 90% params")
    subject = Subject.of(recipe)
    subject.check()
    assert not list(tmp_path.iterdir())  # a check measures nothing
    plans = subject.plans()
    assert {(p.allocation, p.importance) for p in plans.values()} == {("sensitivity", "taylor")}
    (folder,) = tmp_path.glob("runs/sensitivity")
    assert len(list(folder.iterdir())) == 1  # the control's plan reads the student's map
    assert plans["student"].to_json() == Subject.of(recipe).plans()["student"].to_json()
    (limits,) = ([limit.text for limit, *_ in plans["student"].asked],)
    assert limits == ["40%", "90% params"]
    first, again = (subject.batches(1)[0] for _ in range(2))
    assert torch.equal(first[0], again[0])  # the loader shuffles


def test_floors_and_static_layers_reach_both_plans() -> None:
    recipe = replace(RECIPE, target="50%", floors={"blocks.1.conv1": 1.0}, static=("blocks.1.conv2",))
    plans = Subject.of(recipe).plans()
    for plan in plans.values():
        rows = {row.name: row for row in plan.layers}
        assert rows["blocks.1.conv1"].out_after == rows["blocks.1.conv1"].out_before
        assert rows["blocks.1.conv2"].method == "static"


@pytest.mark.parametrize("change", [{"control": False}, {"method": "static"}])
def test_a_control_is_left_out_when_it_is_not_wanted_or_the_same(change: dict[str, Any]) -> None:
    assert list(Subject.of(replace(RECIPE, **change)).plans()) == ["student"]


@pytest.mark.parametrize("of_the_module", [False, True])
def test_a_checkpoint_may_be_of_the_module_or_of_its_network(tmp_path: Path, of_the_module: bool) -> None:
    trained = Digits([8, 16])
    state = trained.state_dict() if of_the_module else trained.net.state_dict()
    torch.save({"state_dict": state, "accuracy": 0.5}, tmp_path / "weights.pt")
    subject = Subject.of(replace(RECIPE, baseline=Baseline(str(tmp_path / "weights.pt"))))
    assert torch.equal(subject.model.net.conv.weight, trained.net.conv.weight)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save(Digits([8, 32]).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"does not fit DigitsNet.*blocks.1.conv1.weight"):
        Subject.of(replace(RECIPE, baseline=Baseline(str(tmp_path / "weights.pt"))))


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    folder.joinpath(f"{name}.py").write_text("from digits import *\n" + code, "utf-8")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"score": "test_accuracy"},
            r"score: the test step of Digits logs no 'test_accuracy'; did you mean 'test_acc'",
        ),
        (
            {"trainer": {"limit_train_batch": 1}},
            r"Trainer has no argument 'limit_train_batch'; did you mean 'limit_train",
        ),
        ({"trainer": {"max_epochs": 3}}, r"trainer.max_epochs is the recipe's own business - set epochs"),
        ({"trainer": {"logger": True}}, r"trainer.logger is the recipe's own business - set wandb"),
        ({"model": {"class_path": "torch.nn.ReLU"}}, r"ReLU is no LightningModule"),
    ],
)
def test_what_is_wrong_is_found_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Subject.of(replace(RECIPE, **change))


def test_missing_data_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class Lost(DigitsData):\n    def prepare_data(self):\n        open('/nowhere/images.bin')\n"
    write(tmp_path, monkeypatch, "lost_data", code)
    with pytest.raises(RecipeError, match=r"data: Lost failed with FileNotFoundError: .*/nowhere/images.bin"):
        Subject.of(replace(RECIPE, data={"class_path": "lost_data.Lost"}))
    missing = {"class_path": "cifar10.Cifar10Data", "init_args": {"root": "/nowhere"}}
    with pytest.raises(RecipeError, match=r"data.root '/nowhere' has no train.parquet"):
        Subject.of(replace(RECIPE, data=missing))


def test_a_network_that_is_never_called_whole_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class Around(Digits):\n    def forward(self, images):\n        return self.net.forward(images)\n"
    write(tmp_path, monkeypatch, "around_it", code)
    with pytest.raises((RecipeError, TraceError), match=r"Around never calls its network 'net'"):
        Subject.of(replace(RECIPE, model={"class_path": "around_it.Around"}))


def test_keyword_arguments_make_a_named_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class Named(Digits):\n    def forward(self, images):\n        return self.net(x=images)\n"
    write(tmp_path, monkeypatch, "named_it", code)
    subject = Subject.of(replace(RECIPE, model={"class_path": "named_it.Named"}))
    assert subject.example["x"].shape == (500, 1, 8, 8)


def test_each_lightning_package_gets_its_own_trainer() -> None:
    assert lightning_of(Digits([8])).__name__ == "pytorch_lightning"
    assert lightning_of(classifier("lightning.pytorch")()).__name__ == "lightning.pytorch"
    with pytest.raises(RecipeError, match="DigitsData is no LightningModule"):
        lightning_of(DigitsData())


@pytest.mark.filterwarnings("error")
def test_lightning_is_quiet_for_a_while_only() -> None:
    import pytorch_lightning
    from pytorch_lightning.utilities.warnings import PossibleUserWarning

    logger = logging.getLogger("pytorch_lightning")
    before = logger.level
    with quiet(pytorch_lightning):
        assert not logger.isEnabledFor(logging.INFO) and logger.isEnabledFor(logging.WARNING)
        warnings.warn("advice", PossibleUserWarning, stacklevel=1)  # an error in these tests, were it not ignored
        with pytest.raises(UserWarning):
            warnings.warn("a real warning", UserWarning, stacklevel=1)
    assert logger.level == before
