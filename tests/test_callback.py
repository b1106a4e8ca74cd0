"""DynCompress in a Trainer: one more callback, nothing else changed."""

from __future__ import annotations

import csv
import json
import pickle
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from dyncompress import DistillConfig, DynCompress, DynCompressError, make_plan
from dyncompress.conversion import convert, narrowed, plan_of
from dyncompress.errors import BudgetError, DistillationError, PlanError, TraceError, UnknownMethodError
from dyncompress.layers import DynamicConv
from tests.classifiers import BATCH, CLASSES, Net, classifier, loader, trainer

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
Classifier = classifier()
Classifier.__module__ = __name__  # pickle finds a class by its name
EXAMPLE = torch.zeros(1, 3, 8, 8)


def fit(module: Any, callback: Any, *others: Any, batches: int = 4, **options: Any) -> Any:
    host = trainer(callbacks=[callback, *others], **options)
    host.fit(module, loader(batches), loader(1))
    return host


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


# ---- the one line ------------------------------------------------------------------------------------------------


def script(package: str, extra: list[Any]) -> tuple[Any, Any]:
    """Somebody's training script. It knows nothing of compression, and is not edited."""
    module = classifier(package)()
    host = import_module(package).Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=extra,
    )
    host.fit(module, loader(), loader(1))
    return module, host


@pytest.mark.parametrize("package", PACKAGES)
def test_one_more_callback_compresses_somebodys_training(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain, before = script(package, [])
    capsys.readouterr()
    module, host = script(package, [DynCompress(target="50%")])  # the one line

    assert {"train_loss", "val_loss"} <= before.callback_metrics.keys()
    assert host.callback_metrics.keys() == before.callback_metrics.keys() | {"distill/loss"}
    assert host.callback_metrics["distill/loss"] > 0
    assert sum(isinstance(m, DynamicConv) for m in module.modules()) == 2  # the first convolution reads the input
    assert plan_of(plain) is None
    plan = plan_of(module)
    assert plan is not None
    assert 0.49 <= plan.ratio <= 0.505
    assert "asked 50%, reached 49.21% of the MACs (618k > 304k)" in capsys.readouterr().out
    assert isinstance(host.callbacks[0], tuple(import_module(f"{p}.callbacks").Callback for p in PACKAGES))


def test_it_converts_as_make_plan_and_convert_do() -> None:
    module = Classifier()
    original = deepcopy(module.net)
    fit(module, DynCompress(0.5, method="dynet", options={"g": 2}, recalibrate=0, seed=7), limit_train_batches=0)
    plan = make_plan(original, EXAMPLE, 0.5, "dynet", options={"g": 2}, allocation="importance")
    expected = convert(original, plan, seed=7)
    assert equal(module.net, weights(expected))


def test_a_plan_decides_in_the_place_of_a_target(tmp_path: Path) -> None:
    module = Classifier()
    plan = make_plan(module.net, EXAMPLE, "40%", "static")
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        module = Classifier()
        fit(module, DynCompress(plan=given), limit_train_batches=0)
        found = plan_of(module)
        assert found is not None
        assert found.widths == plan.widths
        assert not any(isinstance(m, DynamicConv) for m in module.modules())


def test_the_student_starts_as_the_narrowed_network() -> None:
    module = Classifier()
    original = deepcopy(module.net)
    x = torch.randn(5, 3, 8, 8)

    class Start(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            plan = plan_of(pl_module.net)
            assert plan is not None
            reference = narrowed(original, plan).eval()
            self.gap = (pl_module.net.eval()(x) - reference(x)).abs().max().item()
            pl_module.net.train()

    start = Start()
    fit(module, DynCompress("50%"), start, limit_train_batches=1)
    assert start.gap < 1e-4


def test_batchnorm_is_recalibrated_on_training_batches() -> None:
    """The first BatchNorm sees the first convolution's output: its mean over the batches, by hand."""

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                conv, norm, _ = pl_module.net.stem
                with torch.no_grad():
                    outputs = [conv(x).mean((0, 2, 3)) for x, _ in list(loader())[:3]]
                self.gap = (norm.running_mean - torch.stack(outputs).mean(0)).abs().max().item()

    start = Start()
    fit(Classifier(), DynCompress("50%", recalibrate=3), start, limit_train_batches=1)
    assert start.gap < 1e-5
    fit(Classifier(), DynCompress("50%", recalibrate=0), start, limit_train_batches=1)
    assert start.gap > 1e-3


# ---- manners -----------------------------------------------------------------------------------------------------


def test_the_module_can_be_copied_and_pickled_while_it_trains(tmp_path: Path) -> None:
    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            twins = deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))
            for twin in twins:
                assert equal(twin, weights(pl_module))
                assert twin.training_step.__self__ is twin
            torch.save(pl_module, tmp_path / "module.pt")

    fit(Classifier(), DynCompress("50%"), Copy(), limit_train_batches=2)


def test_training_leaves_no_patch_and_no_teacher() -> None:
    module, callback = Classifier(), DynCompress("50%")
    attributes = set(vars(module))
    fit(module, callback)
    assert set(vars(module)) - attributes <= {"_metric_attributes"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(name.startswith("net.") for name in module.state_dict())
    assert module.hparams.keys() == {"width", "lr"}


def test_an_error_in_training_leaves_no_patch() -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        fit(module, DynCompress("50%"))
    assert vars(module).keys().isdisjoint({"training_step", "on_load_checkpoint"})
    assert plan_of(module) is not None


def test_fitting_twice_goes_on_and_validating_converts_nothing() -> None:
    module, callback = Classifier(), DynCompress("50%")
    host = trainer(callbacks=[callback])
    for stage in (host.validate, host.test):
        stage(module, loader(1), verbose=False)
        assert plan_of(module) is None
    host.predict(module, loader(1))
    host.fit(module, loader(), loader(1))
    layers = [m for m in module.modules() if isinstance(m, DynamicConv)]
    host.validate(module, loader(1), verbose=False)
    host.fit_loop.max_epochs = 2
    host.fit(module, loader(), loader(1))
    assert host.global_step == 8
    assert [m for m in module.modules() if isinstance(m, DynamicConv)] == layers
    assert vars(module).keys().isdisjoint({"training_step", "on_load_checkpoint"})


def test_without_distillation_there_is_no_teacher() -> None:
    callback = DynCompress("50%", distill=False)
    host = fit(Classifier(), callback)
    assert "distill/loss" not in host.callback_metrics
    assert callback.state_dict().keys() == {"plan"}


@pytest.mark.filterwarnings("ignore:.*You're using the WeightAveraging callback")
def test_averaging_after_us_averages_the_student() -> None:
    for averaging in (EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)):
        module = Classifier()
        fit(module, DynCompress("50%"), averaging, max_epochs=2)
        assert plan_of(module) is not None


def test_the_learning_rate_finder_sweeps_with_the_teacher(tmp_path: Path) -> None:
    """It sweeps in its own on_fit_start, before ours."""
    taught: list[int] = []
    sweep: list[int] = []

    class Counting(DynCompress):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            super().setup(trainer, pl_module, stage)
            self._teacher.network.register_forward_hook(lambda *_: taught.append(1))

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            sweep.extend(taught)
            super().on_fit_start(trainer, pl_module)

    finder = LearningRateFinder(num_training_steps=4, attr_name="lr", early_stop_threshold=None)
    host = trainer(callbacks=[finder, Counting("50%")], default_root_dir=tmp_path)
    host.fit(Classifier(), loader(8), loader(1))
    assert len(sweep) == 4
    assert len(taught) == 4 + 8


# ---- networks of many kinds --------------------------------------------------------------------------------------


class InSetup(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = Net()
            self.data = loader()


class InConfigureModel(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def setup(self, stage: str) -> None:
        self.data = loader()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Net()


class DataInSetup(Classifier):
    def setup(self, stage: str) -> None:
        self.data = loader()

    def train_dataloader(self) -> Any:
        return self.data

    def val_dataloader(self) -> Any:
        return loader(1)


@pytest.mark.parametrize("kind", [InSetup, InConfigureModel])
def test_a_network_that_is_built_later_is_converted_later(kind: type[Any]) -> None:
    module = kind()
    host = fit(module, DynCompress("50%"))
    assert plan_of(module.net) is not None
    assert host.callback_metrics["distill/loss"] > 0
    assert vars(module).keys().isdisjoint({"setup", "configure_model", "training_step", "on_load_checkpoint"})


def test_data_that_is_opened_later_is_waited_for() -> None:
    module = DataInSetup()
    trainer(callbacks=[DynCompress("50%")]).fit(module)
    assert plan_of(module.net) is not None


def test_the_module_itself_may_be_the_network() -> None:
    class Whole(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
            self.linear = nn.Linear(32, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Whole()
    host = trainer(callbacks=[DynCompress("50%")])
    host.fit(module, loader())
    assert plan_of(module) is not None
    assert module.conv2.out_channels < 32
    assert host.callback_metrics["distill/loss"] > 0


def test_a_compiled_network_is_converted_inside_its_wrapper() -> None:
    torch._dynamo.reset()
    module = Classifier()
    module.net = torch.compile(module.net, backend="eager")
    host = fit(module, DynCompress("50%"), batches=2)
    assert isinstance(module.net._orig_mod.conv2, DynamicConv)
    assert host.callback_metrics["distill/loss"] > 0


# ---- loggers -----------------------------------------------------------------------------------------------------


def test_csv_gets_numbers_and_settings(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    module = Classifier()
    fit(module, DynCompress("50%", distill=DistillConfig(alpha=0.5)), logger=logger, log_every_n_steps=1)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = next(row for row in rows if row["compress/macs"])
    plan = plan_of(module)
    assert plan is not None
    assert (float(first["compress/macs"]), float(first["compress/params"])) == (plan.macs_after, plan.params_after)
    assert float(first["compress/ratio"]) == pytest.approx(plan.ratio)
    assert sum(bool(row["distill/loss"]) for row in rows) == 4
    settings = (tmp_path / "hparams.yaml").read_text()
    assert "dyncompress:" in settings
    assert "alpha: 0.5" in settings


def test_tensorboard_works(tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    fit(Classifier(), DynCompress("50%"), logger=logger, log_every_n_steps=1)
    events = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(tmp_path))
    tags = events.Reload().Tags()["scalars"]
    assert {"compress/macs", "compress/ratio", "compress/params", "distill/loss"} <= set(tags)


def test_the_best_score_is_summed_up_where_runs_are_compared(tmp_path: Path) -> None:
    class Run:
        id = "r1"

        def __init__(self) -> None:
            self.summary: dict[str, Any] = {}
            self.artifacts: list[str] = []

        def log_artifact(self, path: str, name: str, type: str) -> None:
            self.artifacts.append(f"{type} {name} {json.loads(Path(path).read_text())['target']}")

    class Logger(pl.loggers.CSVLogger):
        """What a W&B logger offers."""

        run = Run()
        tables: list[str] = []  # noqa: RUF012 - one test

        @property
        def experiment(self) -> Any:
            return self.run

        def log_table(self, key: str, **_: Any) -> None:
            self.tables.append(key)

        def log_hyperparams(self, params: Any = None) -> None: ...

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

        def save(self) -> None: ...

        def finalize(self, status: str) -> None: ...

    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    fit(Classifier(), DynCompress("50%"), best, logger=Logger(tmp_path), enable_checkpointing=True)
    summary = Logger.run.summary
    assert summary["best/val_loss"] == pytest.approx(float(best.best_model_score))
    assert summary["compress/ratio"] == pytest.approx(0.4921, abs=1e-3)
    assert Logger.run.artifacts == ["plan plan-r1 50%"]
    assert Logger.tables == ["compress/plan"]


def test_fast_dev_run_and_barebones_work() -> None:
    fit(Classifier(), DynCompress("50%"), fast_dev_run=2)
    bare = {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
    host = trainer(
        callbacks=[DynCompress("50%")], enable_model_summary=None, num_sanity_val_steps=None, fast_dev_run=False, **bare
    )
    module = Quiet()
    host.fit(module, loader())
    assert plan_of(module) is not None


class Quiet(pl.LightningModule):
    """Logs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


# ---- configuration files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_cli_takes_it_from_yaml(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {
                    "class_path": "dyncompress.DynCompress",
                    "init_args": {
                        "target": "50%",
                        "options": {"g": 2},
                        "distill": {"alpha": 0.5, "features": {"bn2": 10.0}},
                        "ignore": ["linear"],
                        "teacher": "teacher.ckpt",
                    },
                }
            ],
        },
        "model": {"width": 8},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    cli = import_module(f"{package}.cli").LightningCLI(classifier(package), run=False, save_config_callback=None)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, DynCompress))
    assert (callback.target, callback.options, callback.teacher) == ("50%", {"g": 2}, "teacher.ckpt")
    assert callback.distill == DistillConfig(alpha=0.5, features={"bn2": 10.0})


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, PlanError, "neither target nor plan"),
        ({"target": 0}, BudgetError, "must be positive"),
        ({"target": -0.5}, BudgetError, "must be positive"),
        ({"target": "150%"}, BudgetError, "at most 1"),
        ({"target": "half"}, BudgetError, "'half' is unreadable"),
        ({"target": 0.5, "method": "dynett"}, UnknownMethodError, "did you mean 'dynet'"),
        ({"target": 0.5, "options": {"h": 2}}, DynCompressError, "no option 'h'"),
        ({"target": 0.5, "recalibrate": -1}, DynCompressError, "recalibrate -1"),
    ],
)
def test_arguments_are_refused_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DynCompress(**arguments)


def untouched(module: Any, callback: Any, error: type[Exception], message: str, *others: Any, **options: Any) -> None:
    """Fitting fails, and the module is what it was."""
    before, layers, attributes = weights(module), [type(m) for m in module.modules()], set(vars(module))
    with pytest.raises(error, match=message):
        fit(module, callback, *others, **options)
    assert equal(module, before)
    assert [type(m) for m in module.modules()] == layers
    assert set(vars(module)) <= attributes | {"_metric_attributes"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_an_unreachable_target_gives_the_range() -> None:
    untouched(Classifier(), DynCompress(0.001), BudgetError, "can't be reached with method 'dynet': .* to .* MACs")


def test_a_network_without_convolutions_is_refused() -> None:
    class Linear(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))

    module = Linear()
    with pytest.raises(TraceError, match="Linear has no convolution"):
        trainer(callbacks=[DynCompress(0.5)]).fit(module, loader())
    assert vars(module).keys().isdisjoint({"training_step", "on_load_checkpoint"})


def test_a_module_path_that_does_not_exist_is_refused() -> None:
    untouched(Classifier(), DynCompress(0.5, module="nett"), TraceError, "module='nett' does not exist .* near: net")


def test_several_candidates_are_listed_and_a_path_chooses() -> None:
    module = Classifier()
    module.other = Net()
    untouched(module, DynCompress(0.5), TraceError, "several networks with convolutions: net, other")
    fit(module, DynCompress(0.5, module="net"), limit_train_batches=1)
    assert plan_of(module.net) is not None
    assert plan_of(module.other) is None


def test_a_plan_of_another_network_is_refused() -> None:
    plan = make_plan(Net(24), EXAMPLE, "50%")
    untouched(Classifier(), DynCompress(plan=plan), PlanError, "the plan was made for another network: ")


def test_a_teacher_with_other_outputs_is_refused() -> None:
    teacher = Net()
    teacher.linear = nn.Linear(16, 7)
    message = rf"teacher answers output \({BATCH}, 7\), the student output \({BATCH}, {CLASSES}\)"
    untouched(Classifier(), DynCompress(0.5, teacher=teacher), DistillationError, message)


def test_a_feature_that_does_not_exist_is_refused() -> None:
    config = DistillConfig(features={"bn9": 1.0})
    untouched(Classifier(), DynCompress(0.5, distill=config), DistillationError, "near: bn2, bn1")


def test_an_optimizer_that_was_made_in_init_is_refused() -> None:
    class Early(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> Any:
            return self.optimizer

    untouched(Early(), DynCompress(0.5), PlanError, "made in __init__ holds the original's: make it in configure_opt")


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.01)])
def test_averaging_before_us_is_refused(averaging: Any) -> None:
    module = Classifier()
    host = trainer(callbacks=[averaging, DynCompress(0.5)])
    with pytest.raises(DynCompressError, match=f"{type(averaging).__name__} copied the module before DynCompress"):
        host.fit(module, loader(), loader(1))
    assert plan_of(module) is None


def test_a_step_that_calls_the_layers_is_refused_before_anything_is_trained() -> None:
    class Bypassing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net.linear(self.net.stem(batch[0]).mean((2, 3))), batch[1])

    untouched(
        Bypassing(), DynCompress(0.5, example=EXAMPLE, recalibrate=0), DistillationError, "gave a loss, but its network"
    )


def test_a_loss_that_is_not_finite_is_told() -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("inf")

    untouched(Broken(), DynCompress(0.5), DistillationError, "the loss of training_step is inf in epoch 0, step 0")


def test_a_converted_module_needs_a_teacher() -> None:
    module = Classifier()
    original = deepcopy(module.net)
    fit(module, DynCompress("50%"))
    untouched(module, DynCompress("50%"), DistillationError, "pass the original as teacher=")
    untouched(module, DynCompress("25%", teacher=original), PlanError, "converted already, to 50%, .* asks for 25%")
    assert fit(module, DynCompress("50%", teacher=original)).callback_metrics["distill/loss"] > 0
    fit(module, DynCompress("50%", distill=False))


def test_two_of_them_are_refused_by_lightning() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DynCompress`"):
        trainer(callbacks=[DynCompress("50%"), DynCompress("25%")])
