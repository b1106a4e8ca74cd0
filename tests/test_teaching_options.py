"""What a DistillConfig asks for reaches the training step: labels, schedules, hints, named outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dyncompress.distillation import DistillConfig, Ensemble, Teacher
from dyncompress.errors import DistillationError
from dyncompress.losses import decoupled_loss, logit_loss
from dyncompress.teaching import TaughtStep, labels_of
from tests.classifiers import CLASSES, Net, loader, trainer
from tests.taught import IMAGES, LABELS, Lit, Teach, difference, make_teacher, manual, plain, run


def answers() -> tuple[Tensor, Tensor]:
    """Of the untrained student and of its teacher."""
    with torch.no_grad():
        return Lit().net.train()(IMAGES), make_teacher().network(IMAGES)


# ---- labels ------------------------------------------------------------------------------------------------------

DKD = DistillConfig(kind="dkd", temperature=2.0, beta=3.0)


@pytest.mark.parametrize(("step", "automatic"), [(plain, True), (manual, False)], ids=["automatic", "manual"])
def test_the_batchs_labels_are_the_targets(step: Any, automatic: bool) -> None:
    student, taught = answers()
    with_labels = decoupled_loss(student, taught, 2.0, 3.0, LABELS).item()
    without = decoupled_loss(student, taught, 2.0, 3.0).item()
    assert with_labels != pytest.approx(without, rel=0.01)  # the untrained teacher is wrong on some
    assert run(Lit(step, automatic), replace(DKD, labels=1)).logged[0] == pytest.approx(with_labels, rel=1e-5)
    assert run(Lit(step, automatic), DKD).logged[0] == pytest.approx(without, rel=1e-5)


def test_labels_may_have_a_name() -> None:
    class Named(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return plain(self, batch["image"], batch["target"])

    data = [{"image": image, "target": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    teach = Teach(replace(DKD, labels="target"))
    trainer(callbacks=[teach], limit_train_batches=1).fit(Named(), DataLoader(data, batch_size=4))
    expected = decoupled_loss(*answers(), 2.0, 3.0, LABELS).item()
    assert teach.logged[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "where", "message"),
    [
        ((IMAGES, LABELS), 2, r"labels=2 finds no tensor in the training batch, a tuple of \['Tensor', 'Tensor'\]"),
        ((IMAGES, LABELS), "y", "labels='y' finds no tensor"),
        ({"image": IMAGES}, "label", r"labels='label' finds no tensor .* a dict of \['image'\]; give the index or the"),
        ([IMAGES, "a name"], 1, r"a list of \['Tensor', 'str'\]"),
        (7, 1, r"a int of \[\]"),
    ],
)
def test_a_batch_without_labels_there_is_told_with_what_it_is(batch: Any, where: Any, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        labels_of(batch, where)


def test_labels_of_another_shape_are_refused_in_the_step() -> None:
    with pytest.raises(DistillationError, match=r"labels torch\.float32 of shape \(4, 3, 8, 8\)"):
        run(Lit(), replace(DKD, labels=0))


# ---- schedules ---------------------------------------------------------------------------------------------------


class Log(pl.Callback):
    """Teaches with a schedule; keeps the term, and what a term of weight 1 would have been."""

    def __init__(self, config: DistillConfig) -> None:
        self.config, self.found, self.whole = config, [], []  # type: ignore[var-annotated]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.teacher = make_teacher()
        self.step = TaughtStep(pl_module, pl_module.net, self.teacher, self.config)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        temperature = self.config.at(len(self.found) / 4)[1]
        with torch.no_grad():
            student = pl_module.net.eval()(batch[0])
            self.whole.append(logit_loss(student, self.teacher.network(batch[0]), temperature).item())

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.found.append(trainer.callback_metrics["distill/loss"].item())


def in_eval_mode(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    lit.net.eval()
    return plain(lit, x, y)


@pytest.mark.parametrize(
    ("config", "alphas"),
    [
        (DistillConfig(alpha=2.0, alpha_end=0.0), [2.0, 1.5, 1.0, 0.5]),  # of 4 steps, 0, 1, 2, 3 are done
        (DistillConfig(alpha=0.0, alpha_end=1.0, ramp="cosine"), [0.0, 0.146447, 0.5, 0.853553]),
        (DistillConfig(temperature=1.0, temperature_end=9.0), [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_a_ramp_follows_the_steps_that_are_done(config: DistillConfig, alphas: list[float]) -> None:
    log = Log(config)
    trainer(callbacks=[log]).fit(Lit(in_eval_mode), loader())
    assert log.found == pytest.approx([a * w for a, w in zip(alphas, log.whole, strict=True)], rel=1e-4)


# ---- outputs and teachers ----------------------------------------------------------------------------------------


def test_named_outputs_are_taught_with_their_weights() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return {"out": out, "aux": 2 * out}

    lit = Lit(lambda lit, x, y: F.cross_entropy(lit.net(x)["out"], y))
    lit.net = Two()
    lit.net.load_state_dict(Lit().net.state_dict())
    teacher = Two()
    teacher.load_state_dict(make_teacher().network.state_dict())
    config = DistillConfig(outputs={"output['out']": 2.0, "output['aux']": 0.5})
    student, taught = answers()
    expected = 2 * logit_loss(student, taught, 4.0) + 0.5 * logit_loss(2 * student, 2 * taught, 4.0)
    assert run(lit, config, teacher=Teacher(teacher)).logged[0] == pytest.approx(expected.item(), rel=1e-5)


def test_of_several_teachers_the_first_gives_the_features() -> None:
    second = Net()
    second.bn1 = nn.Identity()  # its features would differ
    first = make_teacher()
    config = DistillConfig(alpha=0.0, features={"bn1": 2.0})
    several = Teacher(Ensemble([make_teacher().network, second]))
    found, expected = run(Lit(), config, teacher=several), run(Lit(), config, teacher=first)
    assert found.logged == expected.logged
    assert difference(found.gradients[0], expected.gradients[0]).abs().max() == 0


def test_several_teachers_average_their_answers() -> None:
    torch.manual_seed(9)
    second = Net()
    student, taught = answers()
    with torch.no_grad():
        mean = ((taught / 4).softmax(1) + (second.eval()(IMAGES) / 4).softmax(1)) / 2
    log_student = (student / 4).log_softmax(1)
    expected = 16 * (mean * (mean.log() - log_student)).sum(1).mean()
    several = Teacher(Ensemble([make_teacher().network, second]))
    assert run(Lit(), teacher=several).logged[0] == pytest.approx(expected.item(), rel=1e-4)
    wide = Net()
    wide.linear = nn.Linear(16, CLASSES + 4)
    with pytest.raises(DistillationError, match=r"the teacher answers output \(4, 7\), the student output \(4, 3\)"):
        run(Lit(), teacher=Teacher(Ensemble([second, wide])))
