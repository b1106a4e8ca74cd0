"""What distillation adds to a training step, beyond the teacher's answer: losses, recorded answers, wrapping.

The step is wrapped by the object that the callback wraps it with. Only the Trainer around it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.request import Request
from benchmarks.speed.rows import Row
from benchmarks.speed.subjects import Subject
from benchmarks.speed.training import BATCH, SGD, labels_for
from dyncompress.distillation import DistillConfig, Teacher
from dyncompress.teaching import TaughtStep

NETWORKS = ("ResNet-18", "CIFAR ResNet-20")
REST = "distilled, less the teacher"


class Learner:
    """A network with the training step of a LightningModule, and what a wrapped step asks of one."""

    automatic_optimization = True
    trainer = SimpleNamespace(barebones=True, precision_plugin=SimpleNamespace(scaler=None))

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        self.net = deepcopy(net).to(x.device).train()
        self._batch = x, y
        self._optimizer = SGD(self.net.parameters())

    def training_step(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch."""
        return F.cross_entropy(self.net(x), y)

    def learn(self) -> None:
        """What a Trainer does with a batch."""
        self._optimizer.zero_grad(set_to_none=True)
        self.training_step(*self._batch).backward()
        self._optimizer.step()


def measure(request: Request) -> Iterator[Row]:
    """A student's step without and with its teacher, the teacher's answer, and what is left between them."""
    y = labels_for(BATCH, request.device)
    for name in NETWORKS:
        subject = Subject.of(name, request.seed)
        x = subject.batch(BATCH).to(request.device)
        race = request.effort.race(arms(subject.dynamic, subject.original, x, y))
        race = race.with_arm(REST, lambda seconds: seconds["distilled"] - seconds["teacher"])
        yield from race.rows(subject=name, setting="training step", batch=BATCH)


def arms(student: nn.Module, original: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """The plain step first."""
    teacher = Teacher(deepcopy(original).to(x.device))
    plain, taught = Learner(student, x, y), Learner(student, x, y)
    TaughtStep(taught, taught.net, teacher, DistillConfig())
    return {"plain": plain.learn, "distilled": taught.learn, "teacher": lambda: teacher.answer((x,), {})}
