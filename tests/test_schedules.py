"""Layers are told how much of a training is over, and a resumed one goes on from there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from dyncompress.callback import DynCompress
from dyncompress.errors import DynCompressError
from dyncompress.layers.warehouse import WarehouseConv
from dyncompress.schedules import anneal, progress
from tests.classifiers import classifier, fit, loader, trainer

Classifier = classifier()
OPTIONS: dict[str, Any] = {"method": "kernelwarehouse", "options": {"warmup": 0.5}, "recalibrate": 0}


def fresh() -> Any:
    torch.manual_seed(0)
    return Classifier()


class Look(pl.Callback):
    """Tau of the first dynamic layer in every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(next(m.tau.item() for m in pl_module.modules() if isinstance(m, WarehouseConv)))


def test_tau_falls_with_the_steps() -> None:
    look = Look()
    fit(fresh(), DynCompress("90%", **OPTIONS), look, max_epochs=2)
    assert look.seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]  # 8 steps, half of them warm-up


def test_accumulated_batches_are_one_step() -> None:
    look = Look()
    fit(fresh(), DynCompress("90%", **OPTIONS), look, max_epochs=2, accumulate_grad_batches=2)
    assert look.seen == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_training_equals_one_that_never_stopped(tmp_path: Path, stop: int) -> None:
    """Stopped within the warm-up, and after it: weights, and tau in every step."""
    whole, parts = fresh(), fresh()
    looks = Look(), Look()
    fit(whole, DynCompress("90%", **OPTIONS), looks[0], max_epochs=3)
    host = trainer(callbacks=[DynCompress("90%", **OPTIONS), Stop(stop), Look()], max_epochs=3)
    host.fit(fresh(), loader(), loader(1))
    host.save_checkpoint(tmp_path / "stopped.ckpt")
    assert host.global_step == 4 * stop
    fit(parts, DynCompress("90%", **OPTIONS), looks[1], max_epochs=3, ckpt_path=tmp_path / "stopped.ckpt")
    assert looks[1].seen == looks[0].seen[4 * stop :]
    for name, value in whole.state_dict().items():
        assert torch.allclose(value.float(), parts.state_dict()[name].float(), atol=1e-6), name


class Stop(pl.Callback):
    """Ends the training after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def test_a_second_training_does_not_start_over() -> None:
    module, look = fresh(), Look()
    original = fresh()
    fit(module, DynCompress("90%", **OPTIONS))
    fit(module, DynCompress("90%", **OPTIONS, teacher=original.net), look)
    assert look.seen == [0.0] * 4


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(3, 8, 8), 0


def told(**options: Any) -> list[float]:
    """Progress in every step of a training of 6 batches an epoch at most."""

    class Tell(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            seen.append(progress(trainer))
            trainer.should_stop = len(seen) == 6

    seen: list[float] = []
    data = torch.utils.data.DataLoader(Endless(), batch_size=2)
    host = trainer(callbacks=[Tell()], limit_val_batches=0, **options)
    host.fit(fresh(), data, loader(1))
    return seen


def test_progress_where_the_end_is_in_steps() -> None:
    assert told(max_epochs=-1, max_steps=4) == [0.0, 0.25, 0.5, 0.75]


def test_progress_where_no_end_is_known() -> None:
    assert told(max_epochs=-1) == pytest.approx([i / 100_000 for i in range(6)])


@pytest.mark.parametrize(
    ("expected", "epoch", "epochs", "step", "part"),
    [
        (100, 0, 10, 25, 0.25),
        (100, 0, 10, 200, 1.0),  # two optimizers take two steps per batch
        (-1, 3, 10, 7, 0.3),  # data without a length
        (float("inf"), 3, -1, 50_000, 0.5),
        (0, 0, None, 1_000_000, 1.0),
    ],
)
def test_progress_of_what_a_trainer_knows(expected: Any, epoch: int, epochs: Any, step: int, part: float) -> None:
    known = SimpleNamespace(
        estimated_stepping_batches=expected, global_step=step, current_epoch=epoch, max_epochs=epochs
    )
    assert progress(known) == part


@pytest.mark.parametrize("part", [-0.1, 1.1, "0.5", True, float("nan")])
def test_no_part_of_a_training_is_refused(part: Any) -> None:
    with pytest.raises(DynCompressError, match="is no part of a training; give steps done / steps in all"):
        anneal(nn.Identity(), part)
