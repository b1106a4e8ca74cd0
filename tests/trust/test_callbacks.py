"""Other callbacks: Lightning's own do beside compression what they do without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.utils.data import DataLoader

import dyncompress as dc
from dyncompress.conversion import plan_of
from tests.classifiers import Net, equal, loader, trainer, weights
from tests.newer import EMAWeightAveraging, averages
from tests.trust.witness import Classifier, check, clean, contrasting, taught

# ---- tuning ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_learning_rate_finder(tmp_path: Path, record_property: Callable[..., None]) -> None:
    """The learning rate finder sweeps with the distillation term in its losses, and training starts untouched by it."""
    finder = LearningRateFinder(num_training_steps=16, attr_name="lr", early_stop_threshold=None)
    run = taught(contrasting(), finder, batches=16, options={"default_root_dir": tmp_path})
    plain = taught(contrasting(), batches=16)
    check(run, steps=16)
    assert len(run.terms) == 16 + 16
    assert run.host.optimizers[0].param_groups[0]["lr"] == run.module.hparams["lr"] == finder.optimal_lr.suggestion()
    assert run.start.keys() == plain.start.keys()
    assert all(torch.equal(value, plain.start[name]) for name, value in run.start.items())
    record_property(
        "figure", "16 of 16 steps of the sweep taught; weights at the start of training are equal bit by bit"
    )


class Sized(Classifier):
    """Makes its own batches, as the batch size finder wants it."""

    images = 2

    def train_dataloader(self) -> Any:
        return DataLoader(loader().dataset, batch_size=self.images)

    def val_dataloader(self) -> Any:
        return loader(1)


@pytest.mark.slow
def test_batch_size_finder(tmp_path: Path, record_property: Callable[..., None]) -> None:
    """The batch size finder tries batches with the teacher beside the student, and training starts untouched by it."""
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2, batch_arg_name="images")
    options = {"default_root_dir": tmp_path}
    run = taught(contrasting(Sized), finder, data=False, options=options)
    assert run.module.images == 4
    check(run, steps=4, attributes={"images", *vars(Sized())})
    assert len(run.terms) > 4
    module = contrasting(Sized)
    module.images = 4
    plain = taught(module, data=False, options=options)
    assert all(torch.equal(value, plain.start[name]) for name, value in run.start.items())
    record_property("figure", f"batch size 2 to {run.module.images}, {len(run.terms) - 4} trial steps taught")


# ---- averaging ---------------------------------------------------------------------------------------------------


def test_stochastic_averaging(record_property: Callable[..., None]) -> None:
    """Stochastic weight averaging leaves the mean of the student's weights at the ends of its epochs."""
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            kept.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def averaging() -> Any:
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)

    without = trainer(callbacks=[averaging()], max_epochs=3)
    without.fit(contrasting(), loader(), loader(2))
    run = taught(contrasting(), Keep(), averaging(), options={"max_epochs": 3})
    check(run, steps=without.global_step)
    ours = dict(run.module.named_parameters())
    # Lightning averages at the start of epochs 1 and 2; epoch 3 only estimates BatchNorm statistics.
    found = max((ours[name] - (kept[0][name] + kept[1][name]) / 2).abs().max().item() for name in ours)
    assert found < 1e-6
    record_property("figure", f"{found:.1e} from the mean of the averaged epochs")


@averages
@pytest.mark.filterwarnings("ignore:.*You're using the WeightAveraging callback")  # a hint
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run saves beside
def test_moving_average(tmp_path: Path, record_property: Callable[..., None]) -> None:
    """A moving average of the student's weights goes on, after it is resumed, as if it had never stopped."""

    def train(folder: str, **arguments: Any) -> Any:
        options = {"max_epochs": 2, "enable_checkpointing": True}
        keep = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        run = taught(contrasting(), EMAWeightAveraging(decay=0.5), keep, options=options, **arguments)
        check(run, steps=8)
        return run

    whole = train("whole")
    resumed = train("resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert (len(whole.terms), len(resumed.terms)) == (8, 4)
    other = whole.module.state_dict()
    found = max((value - other[name]).abs().max().item() for name, value in resumed.module.named_parameters())
    assert found < 1e-6
    record_property("figure", f"weights {found:.1e} apart from those of an unbroken run")


# ---- stopping, saving --------------------------------------------------------------------------------------------


def test_early_stopping(record_property: Callable[..., None]) -> None:
    """Early stopping stops a student's training by the metric that it watches, the distillation term included."""
    stops = []
    for monitor in ("val_loss", "distill/loss"):
        stopping = EarlyStopping(monitor, patience=1, min_delta=1e9)  # nothing is an improvement after the first
        run = taught(contrasting(), stopping, options={"max_epochs": 9})
        check(run, steps=8)
        assert stopping.stopped_epoch == 1
        stops.append(run.host.current_epoch)
    record_property("figure", f"stopped after {stops} of 9 epochs")


def test_accumulation_scheduler(record_property: Callable[..., None]) -> None:
    """A schedule of gradient accumulation counts steps as without compression."""
    run = taught(contrasting(), GradientAccumulationScheduler({0: 1, 1: 4}), options={"max_epochs": 2})
    check(run, steps=4 + 1)
    assert len(run.terms) == 8
    record_property("figure", "5 steps of 8 batches, 8 of 8 batches taught")


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights only"])
def test_every_checkpoint_loads(weights_only: bool, tmp_path: Path, record_property: Callable[..., None]) -> None:
    """Every file that ModelCheckpoint writes (best, last, weights only) loads again, weights equal bit by bit."""
    written: dict[str, dict[str, torch.Tensor]] = {}

    class Noting(ModelCheckpoint):
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            written[Path(filepath).name] = weights(trainer.lightning_module)

    best = Noting(
        tmp_path, "best-{step}", monitor="val_loss", save_top_k=2, save_last=True, save_weights_only=weights_only
    )
    steps = Noting(tmp_path, "step-{step}", save_top_k=-1, every_n_train_steps=3, save_weights_only=weights_only)
    run = taught(contrasting(), best, steps, options={"max_epochs": 3, "enable_checkpointing": True})
    check(run, steps=12)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert {file.name for file in files} <= written.keys()
    assert len(files) == 2 + 1 + 4  # the two best, the last, every third step
    for file in files:
        expected = written[file.name]
        module = dc.load_from_checkpoint(Classifier, file)
        assert equal(module, expected)
        network = dc.load(file, Net())
        assert equal(network, {name.removeprefix("net."): value for name, value in expected.items()})
        assert plan_of(module) == plan_of(network) == plan_of(run.module)
        clean(module)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(module.eval()(x), network.eval()(x))
    assert equal(dc.load_from_checkpoint(Classifier, tmp_path / "last.ckpt"), weights(run.module))
    record_property("figure", f"{len(files)} of {len(files)} files load twice, bit by bit")
