"""Bad input: one clear error each, and the user's module is left as it was."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from dyncompress import DistillConfig, DynCompress, DynCompressError, make_plan
from dyncompress.conversion import plan_of
from dyncompress.errors import (
    BudgetError,
    CheckpointError,
    DistillationError,
    PlanError,
    TraceError,
    UnknownMethodError,
)
from tests.classifiers import BATCH, CLASSES, Net, classifier, equal, fit, loader, trainer, weights
from tests.newer import EMAWeightAveraging, averages

Classifier = classifier()
EXAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, PlanError, "neither target nor plan"),
        ({"target": 0}, BudgetError, "must be positive"),
        ({"target": -0.5}, BudgetError, "must be positive"),
        ({"target": "150%"}, BudgetError, "at most 1"),
        ({"target": "half"}, BudgetError, "'half' is unreadable"),
        ({"target": 0.5, "method": "dynett"}, UnknownMethodError, "did you mean 'dynet'"),
        ({"target": 0.5, "method": "dynet", "options": {"h": 2}}, DynCompressError, "no option 'h'"),
        ({"target": 0.5, "options": {"g": 2}}, DynCompressError, "default, 'auto', has no option 'g'.*method='dynet'"),
        ({"target": 0.5, "recalibrate": -1}, DynCompressError, "recalibrate -1"),
        ({"target": "50%, 40%"}, BudgetError, "limits MACs twice"),
        ({"target": 0.5, "allocation": "best"}, PlanError, "'best' is unknown; choose one of uniform"),
        ({"target": 0.5, "importance": "best"}, PlanError, "'best' is unknown; choose one of magnitude"),
        ({"target": 0.5, "allocation": "sensitivity"}, PlanError, "'sensitivity' takes data.* pass it as plan="),
        ({"target": 0.5, "importance": "taylor"}, PlanError, "'taylor' takes data.* pass it as plan="),
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
    untouched(Classifier(), DynCompress(0.001), BudgetError, "can't be reached with method 'auto': .* to .* MACs")


def test_a_network_without_convolutions_is_refused() -> None:
    module = Classifier()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    untouched(module, DynCompress(0.5), TraceError, "Classifier has no convolution")


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


@pytest.mark.parametrize("averaging", [pytest.param("ema", marks=averages), "swa"])
def test_averaging_before_us_is_refused(averaging: str) -> None:
    module = Classifier()
    first = EMAWeightAveraging() if averaging == "ema" else StochasticWeightAveraging(swa_lrs=0.01)
    host = trainer(callbacks=[first, DynCompress(0.5)])
    with pytest.raises(DynCompressError, match=f"{type(first).__name__} copied the module before DynCompress"):
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


def test_an_error_in_another_stage_leaves_an_attached_module_converted(tmp_path: Path) -> None:
    module, callback = Classifier(), DynCompress("50%")
    trainer(max_epochs=0).fit(module, loader(), loader(1))
    torch.save(trainer_checkpoint(module), tmp_path / "plain.ckpt")
    callback.attach(module, EXAMPLE)
    with pytest.raises(CheckpointError, match="holds no plan"):
        trainer(callbacks=[callback]).test(module, loader(1), ckpt_path=tmp_path / "plain.ckpt")
    assert plan_of(module) is not None


def trainer_checkpoint(module: nn.Module) -> dict[str, Any]:
    return {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 0}


def test_two_of_them_are_refused_by_lightning() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DynCompress`"):
        trainer(callbacks=[DynCompress("50%"), DynCompress("25%")])
