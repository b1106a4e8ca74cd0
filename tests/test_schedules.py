"""Layers are told how much of a training is over, and a resumed one goes on from there."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from dyncompress.bundle import load, save
from dyncompress.callback import DynCompress
from dyncompress.errors import DynCompressError
from dyncompress.folding import fold
from dyncompress.layers import ConvSite, ConvSpec, DynamicConv, get_method, list_methods
from dyncompress.layers.router import RouterLinear
from dyncompress.layers.warehouse import WarehouseConv
from dyncompress.schedules import anneal, hold, progress
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


# ---- dynamics that set in ----------------------------------------------------------------------------------------


def routers(net: nn.Module) -> list[RouterLinear]:
    return [m.router for m in net.modules() if isinstance(m, DynamicConv) and isinstance(m.router, RouterLinear)]


def shares(net: nn.Module) -> set[float | None]:
    return {None if r.share is None else round(r.share.item(), 6) for r in routers(net)}


@pytest.mark.parametrize("method", [name for name in list_methods() if name not in ("auto", "c2sp", "static")])
def test_a_layer_that_is_held_back_does_not_depend_on_its_input(method: str) -> None:
    """At 0 coefficients are those of the router's bias; at 0.25 its logits are bias + a quarter of the rest."""
    (layer,) = get_method(method).build([ConvSite("conv", ConvSpec(4, 6, (1, 1)), positions=16)])
    x, router = torch.randn(2, 4, 4, 4), routers(layer)[0]
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(2, router.in_features)
    offset = torch.zeros(router.out_features) if router.bias is None else router.bias
    whole = router(h)
    hold(layer)
    assert torch.equal(router(h), offset.expand(2, -1))
    anneal(layer, 0.05, warmup=0.2)
    torch.testing.assert_close(router(h), offset + 0.25 * (whole - offset))
    anneal(layer, 0.01, warmup=0.2)  # never less than before
    assert shares(layer) == {0.25}
    expected, changed = layer(x), copy.deepcopy(layer)
    routers(changed)[0].settle()
    torch.testing.assert_close(changed(x), expected)
    assert shares(changed) == {None}
    anneal(layer, 0.2, warmup=0.2)
    torch.testing.assert_close(router(h), whole)


class Shares(pl.Callback):
    """Share of the layers' dynamics in every step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        (share,) = shares(pl_module)
        self.seen.append(share)


def test_dynamics_set_in_within_the_warmup(tmp_path: Path) -> None:
    """8 steps, half of them warm-up; a run that was stopped in the middle goes on from there, and ends the same."""
    whole, parts, looks = fresh(), fresh(), (Shares(), Shares())
    options: dict[str, Any] = {"warmup": 0.75, "recalibrate": 0}
    fit(whole, DynCompress("50%", **options), looks[0], max_epochs=2)
    assert looks[0].seen == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1], abs=1e-5)
    host = trainer(callbacks=[DynCompress("50%", **options), Stop(1)], max_epochs=2)
    host.fit(fresh(), loader(), loader(1))
    host.save_checkpoint(tmp_path / "stopped.ckpt")
    fit(parts, DynCompress("50%", **options), looks[1], max_epochs=2, ckpt_path=tmp_path / "stopped.ckpt")
    assert looks[1].seen == looks[0].seen[4:]
    for name, value in whole.state_dict().items():
        assert torch.allclose(value.float(), parts.state_dict()[name].float(), atol=1e-6), name


def test_files_from_the_middle_of_the_warmup_compute_what_was_trained(tmp_path: Path) -> None:
    module, x = fresh(), torch.randn(3, 3, 8, 8)
    host = trainer(callbacks=[DynCompress("50%", warmup=1.0, recalibrate=0), Stop(1)], max_epochs=2)
    host.fit(module, loader(), loader(1))
    net = module.net.eval()
    for router in routers(net):
        nn.init.normal_(router.weight)
    assert shares(net) == {0.375}  # 3 of 8 steps
    again = load(save(net, tmp_path / "student.safetensors"), fresh().net).eval()
    folded = fold(net)
    with torch.no_grad():
        expected = net(x)
        assert shares(again) == {0.375} and torch.equal(again(x), expected)
        assert (folded(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        for router in routers(again):
            router.release(1.0)
        assert (again(x) - expected).abs().max() > 1e-3 * expected.abs().max()  # the share does matter


def test_a_checkpoint_without_a_warmup_is_dynamic_at_once() -> None:
    held, free = (get_method("condconv").build([ConvSite("c", ConvSpec(4, 4, (1,)), 9)])[0] for _ in range(2))
    hold(held)
    held.load_state_dict(free.state_dict())
    assert shares(held) == {1.0}
    free.load_state_dict(held.state_dict())
    assert shares(free) == {1.0}


@pytest.mark.parametrize("warmup", [-0.1, 1.5, True, "0.2"])
def test_no_part_of_a_training_is_refused_as_a_warmup(warmup: Any) -> None:
    with pytest.raises(DynCompressError, match=r"^warmup .* is no part of a training: give 0"):
        DynCompress("50%", warmup=warmup)
