"""Networks that are built late, compiled, or the LightningModule itself; and loggers of every kind."""

from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dyncompress import DistillConfig, DynCompress
from dyncompress.conversion import plan_of
from dyncompress.layers import DynamicConv
from tests.classifiers import BATCH, CLASSES, Net, classifier, fit, loader, trainer
from tests.wandb_offline import read

Classifier = classifier()


class Quiet(pl.LightningModule):
    """Logs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


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


@pytest.mark.parametrize("call", ["self(x)", "self.forward(x)"])
def test_the_module_itself_may_be_the_network(call: str) -> None:
    class Whole(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
            self.linear = nn.Linear(32, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0]) if call == "self(x)" else self.forward(batch[0])
            return F.cross_entropy(logits, batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Whole()
    host = trainer(callbacks=[DynCompress("50%")])
    host.fit(module, loader())
    assert plan_of(module) is not None
    assert module.conv2.out_channels < 32
    assert host.callback_metrics["distill/loss"] > 0
    assert "forward" not in vars(module)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, at a graph break
def test_a_compiled_module_is_not_compiled_anew_in_every_step() -> None:
    torch._dynamo.reset()
    frames: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        frames.append(graph)
        return graph.forward

    terms = []
    for prepare in (lambda module: module, lambda module: torch.compile(module, backend=backend)):
        torch.manual_seed(0)
        host = trainer(callbacks=[DynCompress("50%")])
        host.fit(prepare(Quiet()), loader(6))
        terms.append(host.callback_metrics["distill/loss"].item())
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)
    assert len(frames) == 2  # up to where the network's answer is looked at, and from there


def test_a_compiled_network_is_converted_inside_its_wrapper() -> None:
    torch._dynamo.reset()
    module = Classifier()
    module.net = torch.compile(module.net, backend="eager")
    host = fit(module, DynCompress("50%"), batches=2)
    assert isinstance(module.net._orig_mod.conv2, DynamicConv)
    assert host.callback_metrics["distill/loss"] > 0


class Manual(Quiet):
    """Its network's input can't be seen without training it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimisation_trains_without_recalibration(capsys: pytest.CaptureFixture[str]) -> None:
    module = Manual()
    host = trainer(callbacks=[DynCompress("50%")])
    host.fit(module, loader())
    assert plan_of(module.net) is not None
    assert host.callback_metrics["distill/loss"] > 0
    assert "the student starts with the original's weights and statistics" in capsys.readouterr().out


class Iterating(Quiet):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_fetches_its_own_batches_is_taught() -> None:
    host = trainer(callbacks=[DynCompress("50%")])
    host.fit(Iterating(), loader())
    assert host.global_step == 4
    assert host.callback_metrics["distill/loss"] > 0


def test_without_batchnorm_and_fit_no_batch_is_read_in_advance() -> None:
    class Counted(Dataset[Any]):
        def __init__(self) -> None:
            self.data, self.reads = loader().dataset, 0

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            return self.data[index]

    module, counted = Quiet(), Counted()
    module.net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    module.net.append(nn.Linear(32, CLASSES))
    example = torch.zeros(1, 3, 8, 8)
    trainer(callbacks=[DynCompress("50%", example=example, warm_start="plain")]).fit(
        module, DataLoader(counted, batch_size=BATCH)
    )
    assert counted.reads == 16  # the epoch


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


def test_an_offline_wandb_run_has_plan_and_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # where artifacts are staged
    logger = pl.loggers.WandbLogger(project="test", save_dir=tmp_path, offline=True)
    best, module = ModelCheckpoint(tmp_path, monitor="val_loss"), Classifier()
    fit(module, DynCompress("50%"), best, logger=logger, enable_checkpointing=True, log_every_n_steps=1)
    logger.experiment.finish()
    wandb.teardown()  # finish() leaves the last records unwritten
    run, plan = read(tmp_path), plan_of(module)
    assert plan is not None
    assert run.summary["compress/macs"] == plan.macs_after
    assert run.summary["compress/params"] == plan.params_after
    assert run.summary["compress/ratio"] == pytest.approx(plan.ratio)
    assert run.summary["best/val_loss"] == pytest.approx(float(best.best_model_score))
    assert run.config["dyncompress"]["target"] == "50%"
    assert run.config["dyncompress"]["distill"]["temperature"] == 4
    assert ("plan", f"plan-{run.id}", ["plan.json"]) in run.artifacts
    assert sum("distill/loss" in row for row in run.history) == 4


def test_fast_dev_run_and_barebones_work() -> None:
    fit(Classifier(), DynCompress("50%"), fast_dev_run=2)
    bare = {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
    host = trainer(
        callbacks=[DynCompress("50%")], enable_model_summary=None, num_sanity_val_steps=None, fast_dev_run=False, **bare
    )
    module = Quiet()
    host.fit(module, loader())
    assert plan_of(module) is not None
