"""``max_drop`` in the Trainer and in a recipe: real trainings, on few images."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import nn

import dyncompress
from digits import DigitsData, DigitsNet
from dyncompress import DynCompress, runner
from dyncompress.allowance import SearchConfig
from dyncompress.cli import main
from dyncompress.conversion import plan_of
from dyncompress.errors import DynCompressError, RecipeError, SearchError
from dyncompress.recipe import Baseline, Recipe, read_recipe
from dyncompress.runner import run_recipe
from tests.classifiers import classifier, equal, loader, trainer, weights

ROOT = Path(__file__).parents[1]
Plain = classifier()


class Scored(Plain):  # type: ignore[misc, valid-type]
    """Validates to its width: what a student scores is what it keeps, and nothing is random."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        kept = sum(p.numel() for p in self.net.parameters()) / 9827
        self.log("val_acc", 0.9 * kept**0.1)


def short(tmp_path: Path, **changes: Any) -> SearchConfig:
    return SearchConfig(**{"trainings": 4, "noise": 0.0, "cache": str(tmp_path / "search"), **changes})


def fit(module: Any, callback: Any, *, validation: bool = True, **options: Any) -> Any:
    host = trainer(callbacks=[callback], **{"limit_train_batches": 1, **options})
    host.fit(module, loader(2), loader(1) if validation else None)
    return host


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_cheapest_network_within_the_drop_is_trained(package: str, tmp_path: Path) -> None:
    base = classifier(package)

    class Module(base):  # type: ignore[misc, valid-type]
        validation_step = Scored.validation_step

    module = Module()
    callback = DynCompress(max_drop=5.0, method="static", search=short(tmp_path, trainings=8))
    host = trainer(package, [callback], limit_train_batches=1)
    host.fit(module, loader(2), loader(1))
    found, plan = callback.found, plan_of(module.net)
    assert found is not None and plan is not None and found.reached and found.baseline == pytest.approx(0.9, abs=1e-6)
    assert plan.widths == found.plan.widths and plan.macs_after == found.plan.macs_after
    # kept ** 0.1 >= 0.85 / 0.9, so 56.5 % of the parameters; some of them, BatchNorms and the head, are not of MACs
    assert 0.5 < plan.params_ratio < 0.66 and plan.params_ratio**0.1 >= 0.85 / 0.9
    dearer = [p for p in found.probes if not p.within]
    assert all(p.ratio < plan.ratio for p in dearer)
    assert host.global_step == 1  # the outer training is its own


def test_after_a_search_the_training_is_that_of_its_plan(tmp_path: Path) -> None:
    results: list[Any] = []
    for arguments in ({"max_drop": 5.0, "search": short(tmp_path)}, {"plan": "that which was found"}):
        if "plan" in arguments:
            arguments = {"plan": results[0][1].found.plan}
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        module, callback = Scored(), DynCompress(method="dynet", options={"placement": "all"}, **arguments)
        host = fit(module, callback, limit_train_batches=2)
        drawn = float(torch.rand(())), float(np.random.rand()), random.random()
        assert module.trainer is host and not any(n in vars(module) for n in ("on_load_checkpoint", "training_step"))
        results.append((weights(module), callback, drawn))
    (first, _, drawn), (second, _, again) = results
    assert drawn == again and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if not name.endswith("_extra_state"))


def test_a_search_that_was_interrupted_goes_on_in_the_next_fit(tmp_path: Path) -> None:
    trained: list[float] = []

    class Counted(Scored):
        stop_after = 2

        def on_train_start(self) -> None:
            if len(trained) == self.stop_after:
                raise RuntimeError("power cut")
            trained.append(sum(p.numel() for p in self.net.parameters()))

    torch.manual_seed(0)
    first = Counted()
    before = weights(first)
    callback = DynCompress(max_drop=5.0, method="static", search=short(tmp_path))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(first, callback)
    assert equal(first, before) and plan_of(first.net) is None and len(trained) == 2
    Counted.stop_after = 99
    callback = DynCompress(max_drop=5.0, method="static", search=short(tmp_path))
    fit(first, callback)
    assert callback.found is not None and callback.found.trainings == 4
    assert len(trained) == 4 + 1 and len(set(trained[:4])) == 4  # no probe twice, and the training itself


def test_a_datamodule_is_set_up_once_and_serves_every_training(tmp_path: Path) -> None:
    calls: list[str] = []

    class Data(pl.LightningDataModule):
        def setup(self, stage: str) -> None:
            calls.append("setup")
            self.batches = loader(2)

        def teardown(self, stage: str) -> None:
            calls.append("teardown")
            del self.batches

        def train_dataloader(self) -> Any:
            return self.batches

        val_dataloader = train_dataloader

    data = Data()
    host = trainer(callbacks=[DynCompress(max_drop=5.0, method="static", search=short(tmp_path))])
    host.fit(Scored(), data)
    assert calls == ["setup", "teardown"] and data.trainer is host


def test_widths_by_measured_drops(tmp_path: Path) -> None:
    module = Scored()
    fit(module, DynCompress(max_drop=5.0, method="static", allocation="sensitivity", search=short(tmp_path)))
    plan = plan_of(module.net)
    assert plan is not None and plan.allocation == "sensitivity"
    assert len(list((tmp_path / "search").glob("sensitivity-*.json"))) == 1


def test_what_it_came_to_is_logged(tmp_path: Path) -> None:
    callback = DynCompress(max_drop=5.0, method="static", search=short(tmp_path))
    fit(Scored(), callback, logger=CSVLogger(tmp_path, name="log", version=""))
    assert callback.found is not None
    header, *rows = (tmp_path / "log/metrics.csv").read_text().splitlines()
    at = header.split(",").index("search/ratio")
    assert callback.found.plan.ratio in [float(row.split(",")[at]) for row in rows if row.split(",")[at]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "33%"}, r"target '33%' is given beside max_drop 1.0, which finds the cost itself"),
        ({"plan": "plan.json"}, r"plan 'plan.json' is given beside max_drop"),
        ({"preset": "dy-resnet18"}, r"preset 'dy-resnet18' is given beside max_drop"),
        ({"importance": "taylor"}, r"'taylor' takes data"),
    ],
)
def test_what_does_not_go_with_it_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DynCompressError, match=message):
        DynCompress(max_drop=1.0, **arguments)
    with pytest.raises(SearchError, match="is no drop"):
        DynCompress(max_drop=-1.0)


def refused(module: Any, message: str, tmp_path: Path, **options: Any) -> None:
    before = weights(module)
    with pytest.raises(SearchError, match=message):
        fit(module, DynCompress(max_drop=1.0, search=short(tmp_path)), **options)
    assert equal(module, before)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_search_needs_a_score_of_validation_data_and_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(Scored(), "the Trainer no validation data; add them, or ask for a target", tmp_path, validation=False)
    refused(Plain(), r"logs no 'val_acc'; it logs val_loss: name one of them", tmp_path)

    class Late(Scored):
        def setup(self, stage: str) -> None:
            self.net = nn.Sequential(nn.Conv2d(3, 8, 1))

        def __init__(self) -> None:
            super().__init__()
            del self.net

    with pytest.raises(SearchError, match="too early"):
        fit(Late(), DynCompress(max_drop=1.0, search=short(tmp_path)))
    with pytest.raises(SearchError, match="no Trainer yet; leave attach out"):
        DynCompress(max_drop=1.0).attach(Scored(), torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr("dyncompress.callback.from_rank_zero", lambda trainer, decide: decide())
    host = trainer(limit_train_batches=1)
    monkeypatch.setattr(type(host), "world_size", 2)
    with pytest.raises(SearchError, match=r"in one process, and this Trainer has 2; search once with devices=1"):
        DynCompress(max_drop=1.0, example=torch.zeros(1, 3, 8, 8))._decide(host, Scored(), Scored().net)


def test_a_drop_out_of_reach_gives_the_widest_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Forgets(Scored):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.9 if self.net.conv1.out_channels == 32 and self.untrained else 0.5)

        untrained = True

        def on_train_end(self) -> None:
            self.untrained = False

    module = Forgets()
    callback = DynCompress(max_drop=1.0, method="static", search=short(tmp_path, trainings=20))
    fit(module, callback)
    plan = plan_of(module.net)
    assert callback.found is not None and not callback.found.reached and plan is not None and plan.ratio == 1.0
    assert "DynCompress: no student was within the drop" in capsys.readouterr().out


# ---- in a recipe -------------------------------------------------------------------------------------------------

RECIPE = Recipe(
    model={"class_path": "digits.Digits", "init_args": {"widths": [16, 16], "lr": 0.02}},
    data={"class_path": "digits.DigitsData"},
    max_drop=4.0,
    method="static",
    search=SearchConfig(epochs=4, trainings=5, tolerance=0.2, noise=0.0),
    baseline=Baseline(epochs=20),
    epochs=4,
    seeds=(0,),
    threads=1,
    wandb=None,
    name="drop",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    measured = runner.measure_latency
    monkeypatch.setattr(runner, "measure_latency", lambda nets, x: measured(nets, x, batch_sizes=(1,), rounds=5))

    def start(recipe: Recipe = RECIPE, **changes: Any) -> str:
        told = io.StringIO()
        run_recipe(replace(recipe, out=str(tmp_path / "out"), **changes), Console(file=told, width=120))
        return told.getvalue()

    return start


def accuracy(net: nn.Module) -> float:
    data = DigitsData()
    return dyncompress.evaluate(net, data.val_dataloader())


@pytest.mark.slow
def test_digits_are_compressed_as_far_as_the_drop_allows(run: Callable[..., str], tmp_path: Path) -> None:
    told = run()
    original = DigitsNet([16, 16])
    original.load_state_dict(torch.load(tmp_path / "out/original.pt"))
    student = dyncompress.load(tmp_path / "out/student.safetensors", DigitsNet([16, 16]))
    plan = plan_of(student)
    assert plan is not None and plan.ratio < 0.8
    assert accuracy(student) >= accuracy(original) - 0.04  # what was found, trained again
    assert "cheapest within the drop" in told
    logged = (tmp_path / "out/logs/search-seed0/metrics.csv").read_text()
    assert "search/reached" in logged
    (file,) = (tmp_path / "out/search").iterdir()
    before = file.stat().st_mtime_ns
    (tmp_path / "out/plan.json").unlink()  # as if it had been cut short before the plan was there
    assert "cheapest within the drop" in run() and file.stat().st_mtime_ns == before  # nothing was trained again


def test_a_recipe_names_what_is_missing(run: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"search.score: the validation step of Digits logs no 'acc'"):
        run(search=SearchConfig(score="acc"))
    with pytest.raises(RecipeError, match=r"search.score: the validation step of Digits logs no 'val_acc'"):
        run(trainer={"limit_val_batches": 0})
    assert not (tmp_path / "out").exists()


def test_a_recipe_asks_for_one_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "recipes/digits.yaml")
    with pytest.raises(SearchError, match=r"target '33%' is given beside max_drop 1.0"):
        read_recipe([path, "--max_drop", "1.0"])
    words = [path, "--target", "null", "--max_drop", "1.0", "--search.trainings", "5"]
    recipe = read_recipe(words)
    assert recipe.max_drop == 1.0 and recipe.target is None and recipe.search == SearchConfig(trainings=5)
    assert read_recipe([*words[:-2], "--max_drop", "0.5 points"]).max_drop == "0.5 points"
    with pytest.raises(DynCompressError, match=r"search.epochs 0"):
        read_recipe([*words, "--search.epochs", "0"])
    with pytest.raises(RecipeError, match=r"narrowing_steps is 9 and epochs 3 - at least one epoch for each step"):
        read_recipe([path, "--narrowing_steps", "9", "--epochs", "3"])
    with pytest.raises(RecipeError, match=r"narrowing_steps is 0"):
        read_recipe([path, "--narrowing_steps", "0"])
    assert main(["plan", *words]) == 2 and "max_drop takes trainings" in capsys.readouterr().err


@pytest.mark.slow
def test_both_arms_are_narrowed_in_steps(run: Callable[..., str], tmp_path: Path) -> None:
    recipe = replace(RECIPE, max_drop=None, target="40%", method="dynet", options={"placement": "all"})
    recipe = replace(recipe, baseline=Baseline(epochs=1), trainer={"limit_train_batches": 2}, narrowing_steps=2)
    told = run(recipe)
    logs = {path.parent.name for path in (tmp_path / "out/logs").glob("*/metrics.csv")}
    arms = {f"{arm}{step}-seed0" for arm in ("static", "student") for step in ("", "-step1")}
    assert logs == {"original-seed0", *arms}
    printed = (tmp_path / "out/logs/student-step1-seed0.txt").read_text()
    assert "with static" in printed and "asked 6" in printed  # sqrt(0.4) is 63 %: the way there, in static layers
    loaded = dyncompress.load(tmp_path / "out/student.safetensors", DigitsNet([16, 16]))
    plan = plan_of(loaded)
    assert plan is not None and plan.method == "dynet" and plan.ratio == pytest.approx(0.4, rel=0.01)
    assert told.count("4 epochs") == 2
