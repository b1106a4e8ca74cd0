"""DynCompress in a Trainer: one more callback, nothing else changed."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from torch import Tensor

from dyncompress import DynCompress, make_plan
from dyncompress.conversion import convert, narrowed, plan_of
from dyncompress.layers import DynamicConv
from tests.classifiers import classifier, equal, fit, loader, trainer, weights
from tests.newer import EMAWeightAveraging, averages

Classifier = classifier()
Classifier.__module__ = __name__  # pickle finds a class by its name
EXAMPLE = torch.zeros(1, 3, 8, 8)


# ---- conversion --------------------------------------------------------------------------------------------------


def test_it_converts_as_make_plan_and_convert_do() -> None:
    module = Classifier()
    original = deepcopy(module.net)
    fit(module, DynCompress(0.5, method="dynet", options={"g": 2}, recalibrate=0, seed=7), limit_train_batches=0)
    plan = make_plan(original, EXAMPLE, 0.5, "dynet", options={"g": 2})
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


def test_what_shapes_the_plan_reaches_it() -> None:
    module = Classifier()
    shape = {"allocation": "importance", "importance": "bn", "floors": {"conv*": 0.5}, "static": ("*",)}
    expected = make_plan(module.net, EXAMPLE, ("60%", "70% params"), **shape)
    callback = DynCompress(target=("60%", "70% params"), **shape)
    callback.attach(module, EXAMPLE)
    found = plan_of(module.net)
    assert found is not None and found.widths == expected.widths
    assert (found.target, found.allocation, found.importance) == ("60%, 70% params", "importance", "bn")
    assert not any(isinstance(m, DynamicConv) for m in module.modules())


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
@pytest.mark.parametrize("averaging", [pytest.param("ema", marks=averages), "swa"])
def test_averaging_after_us_averages_the_student(averaging: str) -> None:
    module = Classifier()
    last = EMAWeightAveraging() if averaging == "ema" else StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit(module, DynCompress("50%"), last, max_epochs=2)
    assert plan_of(module) is not None


def test_the_learning_rate_finder_sweeps_with_the_teacher(tmp_path: Path) -> None:
    """It sweeps in its own on_fit_start, before ours."""
    taught: list[int] = []
    sweep: list[int] = []
    steps: list[int] = []

    class Stepping(Classifier):
        def on_after_backward(self) -> None:
            steps.append(1)

    class Counting(DynCompress):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            super().setup(trainer, pl_module, stage)
            self._teacher.network.register_forward_hook(lambda *_: taught.append(1))

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            sweep.extend(taught)
            super().on_fit_start(trainer, pl_module)

    finder = LearningRateFinder(num_training_steps=4, attr_name="lr", early_stop_threshold=None)
    host = trainer(callbacks=[finder, Counting("50%")], default_root_dir=tmp_path)
    host.fit(Stepping(), loader(8), loader(1))
    assert len(sweep) == 4
    assert len(taught) == len(steps) > 4  # 12, or 8 in Lightning 2.2, which takes the sweep's batches for the fit's
