"""A plain network taught by another one in a training step that is given: nothing is converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from dyncompress.distillation import DistillConfig, Teacher
from dyncompress.teaching import TaughtStep
from tests.classifiers import Net, loader, trainer

IMAGES, LABELS = next(iter(loader()))
DEFAULT = DistillConfig()


class Lit(pl.LightningModule):
    """Its step is given; everything else is as usual."""

    def __init__(self, step: Callable[..., Any] | None = None, automatic: bool = True) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = Net()
        self.step = step or plain
        self.automatic_optimization = automatic

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, *batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(lit.net(x), y)


def manual(lit: Any, x: Tensor, y: Tensor) -> None:
    optimizer = lit.optimizers()
    optimizer.zero_grad()
    lit.manual_backward(plain(lit, x, y))
    optimizer.step()


def make_teacher() -> Teacher:
    torch.manual_seed(6)
    return Teacher(Net())


class Teach(pl.Callback):
    """Installs the step, and keeps what it logs and the gradients before every optimizer step."""

    def __init__(self, config: DistillConfig | None, teacher: Teacher | None = None) -> None:
        self.config, self.teacher = config, teacher or make_teacher()
        self.gradients: list[dict[str, Tensor]] = []
        self.logged: list[float] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.config is not None:
            TaughtStep(pl_module, pl_module.net, self.teacher, self.config)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.net.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if "distill/loss" in trainer.callback_metrics:
            self.logged.append(trainer.callback_metrics["distill/loss"].item())


def run(lit: Any, config: DistillConfig | None = DEFAULT, steps: int = 1, **options: Any) -> Teach:
    teach = Teach(config, options.pop("teacher", None))
    trainer(callbacks=[teach], limit_train_batches=steps, **options).fit(lit, loader())
    return teach


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    assert a.keys() == b.keys()
    return torch.cat([(a[name] - b[name]).double().flatten() for name in a])
