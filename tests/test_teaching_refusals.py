"""Distillation leaves nothing on the module, and says so when it can't reach the student."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyncompress.distillation import DistillConfig, Teacher
from dyncompress.errors import DistillationError
from dyncompress.teaching import TaughtStep
from tests.classifiers import BATCH, CLASSES, Net, loader, trainer
from tests.taught import Lit, Teach, make_teacher, plain, run

# ---- nothing stays -----------------------------------------------------------------------------------------------


def test_between_steps_the_module_has_no_hook_and_no_graph() -> None:
    answers = []

    def step(lit: Any, x: Tensor, y: Tensor) -> Tensor:
        logits = lit.net(x)
        answers.append(weakref.ref(logits))
        return F.cross_entropy(logits, y)

    class Look(Teach):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in pl_module.modules())
            twin = deepcopy(pl_module)
            assert not [m for m in vars(twin).values() if isinstance(m, (Teacher, TaughtStep))]
            assert not any(key.startswith("teacher") for key in pl_module.state_dict())

    lit, look = Lit(step), Look(DistillConfig())
    parameters = len(list(lit.parameters()))
    trainer(callbacks=[look], limit_train_batches=2).fit(lit, loader())
    gc.collect()
    assert not [ref for ref in answers if ref() is not None]
    assert len(list(lit.parameters())) == parameters


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_what_a_skipped_step_ran_is_forgotten() -> None:
    def step(lit: Any, x: Tensor, y: Tensor, runs: bool) -> Tensor | None:
        lit.net.eval()
        if lit.trainer.fit_loop.batch_idx == 1:
            return plain(lit, x, y)
        if runs:
            lit.net(x + 1)
        return None

    terms = [run(Lit(lambda lit, x, y, runs=runs: step(lit, x, y, runs)), steps=2).logged for runs in (False, True)]
    assert terms[0] == terms[1]
    assert len(terms[0]) == 1


def test_the_users_code_runs_without_the_patch() -> None:
    seen = []

    def step(lit: Any, x: Tensor, y: Tensor) -> Tensor:
        seen.append("training_step" in vars(lit))
        return plain(lit, x, y)

    lit = Lit(step)
    run(lit, steps=2)
    assert seen == [False, False]
    assert "training_step" in vars(lit)  # nobody undid it here


def test_a_validation_step_may_call_it() -> None:
    class Shared(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    lit, teach = Shared(), Teach(DistillConfig())
    calls = []
    teach.teacher.network.register_forward_hook(lambda *_: calls.append(1))
    trainer(callbacks=[teach], limit_train_batches=2).fit(lit, loader(), loader(3))
    assert len(calls) == 2  # of the two training steps


def test_undone_it_is_the_users_step() -> None:
    lit = Lit()
    TaughtStep(lit, lit.net, make_teacher(), DistillConfig()).undo()
    assert "training_step" not in vars(lit)


# ---- what can't be taught ----------------------------------------------------------------------------------------


def bypassing(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(lit.net.linear(lit.net.stem(x).mean((2, 3))), y)


def reentrant(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(checkpoint(lit.net, x.requires_grad_(), use_reentrant=True), y)


def without_gradients(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = lit.net(x)
    return F.cross_entropy(logits.requires_grad_(), y)


@pytest.mark.parametrize("step", [bypassing, reentrant, without_gradients])
def test_a_step_without_a_captured_forward_is_an_error(step: Any) -> None:
    with pytest.raises(
        DistillationError, match=r"training_step of Lit gave a loss, but its network \(Net\) did not run"
    ):
        run(Lit(step))


def no_manual_backward(lit: Any, x: Tensor, y: Tensor) -> None:
    plain(lit, x, y).backward()


def manual_bypassing(lit: Any, x: Tensor, y: Tensor) -> None:
    lit.manual_backward(bypassing(lit, x, y))


@pytest.mark.parametrize("step", [no_manual_backward, manual_bypassing])
def test_manual_optimisation_without_a_taught_backward_is_an_error(step: Any) -> None:
    with pytest.raises(DistillationError, match=r"self\.manual_backward after it"):
        run(Lit(step, automatic=False))


def test_a_frozen_network_has_nothing_to_learn() -> None:
    class Frozen(Lit):
        def __init__(self) -> None:
            super().__init__(lambda lit, x, y: F.cross_entropy(lit.head(lit.net(x)), y))
            self.net.requires_grad_(False)
            self.head = nn.Linear(CLASSES, CLASSES)

    assert not run(Frozen()).logged


def test_a_teacher_with_other_outputs_is_refused_with_both_shapes() -> None:
    wide = Net()
    wide.linear = nn.Linear(16, 7)
    with pytest.raises(DistillationError, match=rf"output \({BATCH}, 7\), the student output \({BATCH}, {CLASSES}\)"):
        run(Lit(), teacher=Teacher(wide))


def broken_loss(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    return plain(lit, x, y) * (float("nan") if lit.global_step == 2 else 1)


def test_a_loss_that_is_not_finite_is_told_with_its_step_and_origin() -> None:
    with pytest.raises(DistillationError, match=r"the loss of training_step is nan in epoch 0, step 2; lower"):
        run(Lit(broken_loss), steps=4)
    teacher = make_teacher()
    with torch.no_grad():
        teacher.network.linear.weight.fill_(float("inf"))
    with pytest.raises(DistillationError, match=r"the distillation term is nan in epoch 0, step 0"):
        run(Lit(), teacher=teacher)


def test_features_inside_a_compiled_network_are_refused() -> None:
    lit = Lit()
    lit.net = torch.compile(lit.net, backend="eager")
    with pytest.raises(DistillationError, match=r"can't be seen inside a compiled network"):
        run(lit, DistillConfig(features={"bn1": 1.0}))
