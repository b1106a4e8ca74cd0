"""A recipe run from end to end on a few images: what it leaves, how it goes on, what it does not do twice."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from rich.console import Console

import dyncompress
from digits import Digits, DigitsNet
from dyncompress import runner
from dyncompress.conversion import plan_of
from dyncompress.errors import RecipeError
from dyncompress.recipe import Baseline, Recipe
from dyncompress.report import Report
from dyncompress.runner import run_recipe
from tests.wandb_offline import read

RECIPE = Recipe(
    model={"class_path": "digits.Digits", "init_args": {"widths": [8, 16]}},
    data={"class_path": "digits.DigitsData"},
    target="50%",
    baseline=Baseline(epochs=2),
    epochs=1,
    seeds=(0,),
    trainer={"limit_train_batches": 4, "limit_val_batches": 1},
    wandb=None,
    name="tiny",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Report, str]]:
    """Run the recipe with changes in one folder; gives the report and what was told."""
    measured = runner.measure_latency
    monkeypatch.setattr(runner, "measure_latency", lambda nets, x: measured(nets, x, batch_sizes=(1,), rounds=5))

    def start(**changes: Any) -> tuple[Report, str]:
        told = io.StringIO()
        recipe = replace(RECIPE, out=str(tmp_path / "out"), **changes)
        return run_recipe(recipe, Console(file=told, width=120)), told.getvalue()

    return start


def test_a_run_compares_three_networks_and_leaves_everything_to_check_them(
    run: Callable[..., tuple[Report, str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report, told = run(seeds=(3, 4))
    out = tmp_path / "out"
    assert list(report.arms) == ["original", "static", "student"]
    assert [arm.score.n for arm in report.arms.values()] == [1, 2, 2]
    assert report.macs_ratio == pytest.approx(0.5, rel=0.01) and report.target == "50%"
    assert report.static is not None and report.static.macs == pytest.approx(report.student.macs, rel=0.01)
    assert all(list(arm.latency) == [1] for arm in report.arms.values())

    names = "control.json original.pt plan.json recipe.json report.csv report.json scores.json student.safetensors"
    assert {path.name for path in out.iterdir() if path.is_file()} == {*names.split(), "tradeoff.png"}
    written = json.loads((out / "scores.json").read_text())
    assert written == {name: {str(k): v for k, v in arm.score.seeds} for name, arm in report.arms.items()}
    assert Report.load(out) == report
    logged = {path.parent.name for path in out.rglob("metrics.csv")}
    assert logged == {f"{arm}-seed{seed}" for arm in ("static", "student") for seed in (3, 4)} | {"original-seed3"}

    lines = [line.split()[:3] for line in told.splitlines() if " seed " in line]
    arms = [["static", "seed", "3"], ["student", "seed", "3"], ["static", "seed", "4"], ["student", "seed", "4"]]
    assert lines == [["original", "seed", "3"], *arms]
    assert capfd.readouterr() == ("", "")  # nothing is told past the console


def test_the_bundle_is_the_first_seeds_student(run: Callable[..., tuple[Report, str]], tmp_path: Path) -> None:
    report, _ = run()
    student = dyncompress.load(tmp_path / "out/student.safetensors", DigitsNet([8, 16]))
    plan = plan_of(student)
    assert plan is not None and plan.target == "50%" and plan.method == "auto"
    module = Digits([8, 16])
    module.net = student
    from digits import DigitsData

    score = dyncompress.evaluate(student, DigitsData().test_dataloader())
    assert score == pytest.approx(report.student.score.values[0])


def trainings(told: str) -> list[str]:
    """The arms of the lines that tell of a training."""
    return re.findall(r"^(original|static|student)\s+seed \d", told, re.M)


def test_a_second_run_does_only_what_is_missing(run: Callable[..., tuple[Report, str]], tmp_path: Path) -> None:
    first, _ = run()
    again, told = run()
    assert not trainings(told) and again.student.score == first.student.score
    more, told = run(seeds=(0, 1))
    assert trainings(told) == ["static", "student"]
    assert more.student.score.seeds[0] == first.student.score.seeds[0] and more.student.score.n == 2
    assert more.original.score == first.original.score


def test_a_run_that_was_cut_short_keeps_what_is_finished(
    run: Callable[..., tuple[Report, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = runner.save

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(runner, "save", full)
    with pytest.raises(OSError, match="no space left"):
        run()
    assert set(json.loads((tmp_path / "out/scores.json").read_text())) == {"original", "static"}
    monkeypatch.setattr(runner, "save", save)
    _, told = run()
    assert trainings(told) == ["student"]
    assert (tmp_path / "out/student.safetensors").exists()


def test_an_edited_plan_is_carried_out(run: Callable[..., tuple[Report, str]], tmp_path: Path) -> None:
    run(seeds=(0,))
    out = tmp_path / "out"
    plan = json.loads((out / "plan.json").read_text())
    plan["groups"][0]["keep"] = 3
    (out / "plan.json").write_text(json.dumps(plan))
    (out / "scores.json").write_text(json.dumps({"original": {"0": 0.5}, "static": {"0": 0.25}}))
    report, _ = run()
    assert plan_of(dyncompress.load(out / "student.safetensors", DigitsNet([8, 16]))).widths[0] == 3
    assert report.original.score.values == (0.5,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "60%"}, r"out was begun with another recipe: target was '50%', is '60%' .* --out"),
        ({"epochs": 2}, r"epochs was 1, is 2"),
    ],
)
def test_a_folder_holds_one_recipe(
    run: Callable[..., tuple[Report, str]], change: dict[str, Any], message: str
) -> None:
    run()
    with pytest.raises(RecipeError, match=message):
        run(**change)


def test_a_folder_from_before_there_were_some_keys_goes_on(
    run: Callable[..., tuple[Report, str]], tmp_path: Path
) -> None:
    run()
    begun = tmp_path / "out/recipe.json"
    content = json.loads(begun.read_text())
    for key in ("max_drop", "search", "narrowing_steps"):
        del content["recipe"][key]
    begun.write_text(json.dumps(content))
    _, told = run()
    assert not trainings(told)
    with pytest.raises(RecipeError, match="epochs was 1, is 2"):
        run(narrowing_steps=2, epochs=2)


def test_a_wrong_recipe_leaves_nothing_behind(run: Callable[..., tuple[Report, str]], tmp_path: Path) -> None:
    with pytest.raises(dyncompress.DynCompressError, match="can't be reached"):
        run(target="1%")
    with pytest.raises(RecipeError, match="no 'accuracy'"):
        run(score="accuracy")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_takes_the_place_of_the_baseline(run: Callable[..., tuple[Report, str]], tmp_path: Path) -> None:
    torch.save(Digits([8, 16]).net.state_dict(), tmp_path / "weights.pt")
    report, told = run(baseline=Baseline(str(tmp_path / "weights.pt")), control=False)
    assert "from the checkpoint" in told and report.static is None
    assert not (tmp_path / "out/original.pt").exists()


def test_one_wandb_run_per_training_and_the_report_in_the_last(
    run: Callable[..., tuple[Report, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))  # no key there
    for name in ("DATA", "CACHE"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    report, told = run(wandb="project")
    assert told.startswith("W&B is offline: no key is set; runs are kept in")
    assert wandb.run is None and "WANDB_MODE" not in os.environ
    wandb.teardown()
    runs = [read(folder) for folder in sorted((tmp_path / "out/wandb").glob("offline-run-*"))]
    arms = {found.config["arm"]: found for found in runs}
    assert set(arms) == {"original", "static", "student"} and all(found.finished for found in runs)
    assert arms["student"].summary["compress/macs"] == report.student.macs
    assert arms["student"].summary["compress/score"] == pytest.approx(report.student.score.mean)
    assert arms["static"].summary["test_acc"] == pytest.approx(report.arms["static"].score.mean)
    assert "compress/score" not in arms["static"].summary


def test_modules_of_the_other_lightning_package_run_too(
    run: Callable[..., tuple[Report, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from lightning.pytorch import LightningDataModule\n"
        "from tests.classifiers import classifier, loader\n"
        "Theirs = classifier('lightning.pytorch')\n"
        "class Tested(Theirs):\n"
        "    def test_step(self, batch, batch_idx):\n"
        "        x, y = batch\n"
        "        self.log('test_acc', (self.net(x).argmax(1) == y).float().mean())\n"
        "class Data(LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return loader()\n"
        "    def test_dataloader(self):\n"
        "        return loader()\n"
    )
    (tmp_path / "other_lightning.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    report, _ = run(
        model={"class_path": "other_lightning.Tested"},
        data={"class_path": "other_lightning.Data"},
        trainer={"limit_val_batches": 0},
    )
    assert report.student.score.n == 1 and report.macs_ratio < 0.5


def test_threads_are_set_for_a_while_only() -> None:
    before = torch.get_num_threads()
    with runner.torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        with runner.torch_threads(0):
            assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
