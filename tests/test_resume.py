"""Training goes on where it stopped: the same plan, the same teacher, or a clear no."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dyncompress.callback import DynCompress
from dyncompress.checkpoint import read_plan
from dyncompress.conversion import plan_of
from dyncompress.errors import CheckpointError, DistillationError, PlanError
from dyncompress.layers import DynamicConv
from tests.classifiers import classifier, equal, fit, loader, trainer, weights
from tests.newer import EMAWeightAveraging, averages

Classifier = classifier()


def fresh(seed: int = 0, **arguments: Any) -> Any:
    """A newly built module; the same seed builds the same weights, as loading pretrained ones would."""
    torch.manual_seed(seed)
    return Classifier(**arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of one epoch: compressed, with its teacher, weights only, and never compressed."""
    folder = tmp_path_factory.mktemp("saved")
    host = fit(fresh(), DynCompress("50%"))
    host.save_checkpoint(folder / "full.ckpt")
    host.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    fit(fresh(), DynCompress("50%", save_teacher=True)).save_checkpoint(folder / "taught.ckpt")
    fit(fresh(), pl.Callback()).save_checkpoint(folder / "plain.ckpt")
    torch.save(fresh().state_dict(), folder / "original.pt")
    return folder


def state(path: Path) -> dict[str, Any]:
    """The callback's state in a checkpoint, read as data: it holds plain values and tensors only."""
    found: dict[str, Any] = torch.load(path, weights_only=True)["callbacks"]["DynCompress"]
    return found


# ---- killed ------------------------------------------------------------------------------------------------------

KILLED = """
import sys, time
import torch
torch.set_num_threads(1)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from dyncompress import DynCompress
from tests.classifiers import classifier, loader, trainer, equal, fit, weights

class Hang(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            open(sys.argv[1] + "/hanging", "w").close()
            time.sleep(600)

torch.manual_seed(0)
keep = ModelCheckpoint(sys.argv[1], save_last=True, every_n_train_steps=1)
host = trainer(callbacks=[DynCompress("50%"), keep, Hang()], max_epochs=3, enable_checkpointing=True)
host.fit(classifier()(), loader(), loader(1))
"""


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
def test_a_run_that_was_killed_in_mid_epoch_goes_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "hanging").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6  # 4 + 2: in the middle of the second epoch
    plan, teacher, killed = read_plan(last), state(last)["teacher"], torch.load(last, weights_only=True)["state_dict"]
    module, callback = fresh(), DynCompress("50%")

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.step = trainer.global_step
            self.loaded = equal(pl_module, killed)

    look, keep = Look(), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    host = fit(module, callback, keep, look, max_epochs=3, ckpt_path=last, enable_checkpointing=True)
    assert (look.step, look.loaded) == (6, True)
    again = version("lightning").startswith("2.2.")  # it trains the batch anew at whose end it saved
    assert host.global_step == 12 + again
    assert plan_of(module) == plan
    assert callback.state_dict()["teacher"] == teacher
    assert host.callback_metrics["distill/loss"] > 0
    assert not equal(module, killed)


# ---- the teacher -------------------------------------------------------------------------------------------------


def test_resuming_equals_never_having_stopped(saved: Path) -> None:
    whole, parts = fresh(), fresh()
    fit(whole, DynCompress("50%"), max_epochs=2)
    fit(parts, DynCompress("50%"), max_epochs=2, ckpt_path=saved / "full.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.allclose(value.float(), parts.state_dict()[name].float(), atol=1e-6), name


def test_another_teacher_is_refused_and_the_module_stays_as_it_was(saved: Path) -> None:
    module = fresh(seed=1)
    before = weights(module)
    with pytest.raises(
        DistillationError, match=r"was taught by network \w{16}, and this one is \w{16}.* pass teacher="
    ):
        fit(module, DynCompress("50%"), max_epochs=2, ckpt_path=saved / "full.ckpt")
    assert equal(module, before)
    assert vars(module).keys().isdisjoint({"training_step", "on_load_checkpoint"})


def test_the_right_teacher_may_be_given_as_file_or_network(saved: Path) -> None:
    """Here the module's own weights are others: even the widths of the plan are chosen by the checkpoint's."""
    for teacher in (saved / "original.pt", str(saved / "plain_as_saved.ckpt"), fresh().net):
        if str(teacher).endswith("plain_as_saved.ckpt"):
            torch.save({"state_dict": fresh().state_dict()}, teacher)
        module, callback = fresh(seed=1), DynCompress("50%", teacher=teacher)
        fit(module, callback, max_epochs=2, ckpt_path=saved / "full.ckpt")
        assert callback.state_dict()["teacher"] == state(saved / "full.ckpt")["teacher"]
        assert plan_of(module) == read_plan(saved / "full.ckpt")


def test_another_teacher_that_is_named_is_taken_and_told(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = DynCompress("50%", teacher=fresh(seed=2).net)
    fit(fresh(), callback, max_epochs=2, ckpt_path=saved / "full.ckpt")
    told = capsys.readouterr().out
    assert (
        f"teacher {callback.state_dict()['teacher']} takes the place of {state(saved / 'full.ckpt')['teacher']}" in told
    )


def test_a_saved_teacher_comes_back_with_the_checkpoint(saved: Path) -> None:
    assert "teacher_weights" not in state(saved / "full.ckpt")
    module, callback = fresh(seed=1), DynCompress("50%")
    original = fresh().net.state_dict()

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.found = weights(callback._teacher.network)

    look = Look()
    fit(module, callback, look, max_epochs=2, ckpt_path=saved / "taught.ckpt")
    assert all(torch.equal(look.found[name], value) for name, value in original.items())
    assert callback.state_dict()["teacher"] == state(saved / "taught.ckpt")["teacher"]


def test_what_a_tested_checkpoint_says_is_forgotten_when_another_module_is_fitted(saved: Path) -> None:
    callback = DynCompress("50%")
    trainer(callbacks=[callback]).test(fresh(), loader(1), ckpt_path=saved / "full.ckpt", verbose=False)
    assert fit(fresh(seed=1), callback).global_step == 4


def test_switching_distillation_off_needs_no_teacher(saved: Path) -> None:
    host = fit(fresh(seed=1), DynCompress("50%", distill=False), max_epochs=2, ckpt_path=saved / "full.ckpt")
    assert host.global_step == 8


def test_teacher_files_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    torch.save(fresh(width=8).state_dict(), tmp_path / "narrow.pt")
    for path, message in ((tmp_path / "narrow.pt", "does not fit Net"), (tmp_path / "missing.pt", "there is no file")):
        module = fresh()
        before = weights(module)
        with pytest.raises(CheckpointError, match=message):
            fit(module, DynCompress("50%", teacher=path))
        assert equal(module, before)


# ---- the plan ----------------------------------------------------------------------------------------------------


def test_the_checkpoints_plan_wins_over_the_target(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = fresh()
    host = fit(module, DynCompress("25%", method="static"), max_epochs=2, ckpt_path=saved / "full.ckpt")
    assert plan_of(module) == read_plan(saved / "full.ckpt")
    assert "asked 25% (a checkpoint's plan for 50% decides), reached 49.71%" in capsys.readouterr().out
    assert host.global_step == 8
    trained = {id(p) for group in host.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}


@averages
@pytest.mark.filterwarnings("ignore:.*You're using the WeightAveraging callback")
def test_averaging_resumes_with_the_same_plan_and_refuses_another(saved: Path, tmp_path: Path) -> None:
    averaged = fit(fresh(), DynCompress("50%"), EMAWeightAveraging())
    averaged.save_checkpoint(tmp_path / "ema.ckpt")
    host = fit(fresh(), DynCompress("50%"), EMAWeightAveraging(), max_epochs=2, ckpt_path=tmp_path / "ema.ckpt")
    assert host.global_step == 8
    module = fresh()
    before = weights(module)
    with pytest.raises(CheckpointError, match=r"EMAWeightAveraging has copied the module, .* pass plan="):
        fit(module, DynCompress("25%"), EMAWeightAveraging(), max_epochs=2, ckpt_path=tmp_path / "ema.ckpt")
    assert equal(module, before)
    callback = DynCompress(plan=tmp_path / "ema.ckpt")  # the way out
    fit(fresh(), callback, EMAWeightAveraging(), max_epochs=2, ckpt_path=tmp_path / "ema.ckpt")


def test_a_strategy_that_loads_late_is_refused(saved: Path) -> None:
    class Late(pl.strategies.SingleDeviceStrategy):
        """As FSDP and DeepSpeed do: weights are loaded after the module was wrapped."""

        @property
        def restore_checkpoint_after_setup(self) -> bool:
            return True

    with pytest.raises(CheckpointError, match=r"Late has split the module, .* pass plan="):
        fit(fresh(), DynCompress("25%"), max_epochs=2, ckpt_path=saved / "full.ckpt", strategy=Late(), devices="auto")
    host = fit(
        fresh(), DynCompress("50%"), max_epochs=2, ckpt_path=saved / "full.ckpt", strategy=Late(), devices="auto"
    )
    assert host.global_step == 8


def test_a_checkpoint_that_was_never_compressed_is_refused(saved: Path) -> None:
    module = fresh()
    before = weights(module)
    with pytest.raises(
        CheckpointError, match=r"holds no plan: .* with Classifier\.load_from_checkpoint, and leave out ckpt"
    ):
        fit(module, DynCompress("50%"), max_epochs=2, ckpt_path=saved / "plain.ckpt")
    assert equal(module, before)


def test_a_plan_of_another_network_is_refused(saved: Path) -> None:
    module = fresh(width=24)
    before = weights(module)
    with pytest.raises(PlanError, match="the plan was made for another network: "):
        fit(module, DynCompress("50%"), max_epochs=2, ckpt_path=saved / "full.ckpt")
    assert equal(module, before)


# ---- other stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full.ckpt", "weights.ckpt"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_rebuild_what_the_checkpoint_holds(stage: str, name: str, saved: Path) -> None:
    module = fresh(seed=1)
    host = trainer(callbacks=[DynCompress("25%")])
    getattr(host, stage)(module, loader(1), ckpt_path=saved / name)
    assert equal(module, torch.load(saved / name, weights_only=True)["state_dict"])
    assert isinstance(module.net.conv2, DynamicConv)
    assert vars(module).keys().isdisjoint({"training_step", "on_load_checkpoint"})


def test_an_original_checkpoint_is_evaluated_as_it_is(saved: Path) -> None:
    module = fresh(seed=1)
    trainer(callbacks=[DynCompress("50%")]).test(module, loader(1), ckpt_path=saved / "plain.ckpt", verbose=False)
    assert plan_of(module) is None
    assert equal(module, torch.load(saved / "plain.ckpt", weights_only=True)["state_dict"])


def test_the_best_checkpoint_of_a_fit_is_tested(tmp_path: Path, saved: Path) -> None:
    module, callback = fresh(), DynCompress("50%")
    keep = ModelCheckpoint(tmp_path, monitor="val_loss")
    host = fit(module, callback, keep, max_epochs=2, enable_checkpointing=True)
    layers = list(module.net.modules())
    host.test(module, loader(1), ckpt_path="best", verbose=False)
    assert equal(module, torch.load(keep.best_model_path, weights_only=True)["state_dict"])
    assert list(module.net.modules()) == layers  # loaded, not built anew
    other = fit(fresh(), DynCompress("25%"))
    other.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"the original is gone, .* newly built module"):
        host.test(module, loader(1), ckpt_path=tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="holds no plan"):
        host.test(module, loader(1), ckpt_path=saved / "plain.ckpt")


def test_a_copy_made_between_fits_trains_on(saved: Path) -> None:
    module, callback = fresh(), DynCompress("50%", teacher=fresh().net)
    fit(module, callback)
    twin = deepcopy(module)
    fit(twin, callback)
    assert plan_of(twin) == plan_of(module)
    assert not equal(twin, weights(module))
