"""One training beside compression, and all that a test can ask of it afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from torch import Tensor

from dyncompress import DynCompress, teaching
from dyncompress.conversion import plan_of
from dyncompress.layers import DynamicConv
from dyncompress.layers.dynet import DyNetConv
from dyncompress.layers.router import RouterLinear
from tests.classifiers import classifier, loader, trainer, weights

Classifier = classifier()


def contrasting(kind: type[Any] = Classifier, **arguments: Any) -> Any:
    """A module, the same in every call, whose scores are far enough apart for a distillation term of some size."""
    torch.manual_seed(0)
    module = kind(**arguments)
    with torch.no_grad():
        module.net.linear.weight.mul_(10)
    return module


@dataclass
class Run:
    """What was seen of one training."""

    module: Any
    callback: DynCompress
    host: Any = None
    terms: list[float] = field(default_factory=list)  # of every run of the student that was taught
    logged: list[float] = field(default_factory=list)  # "distill/loss" after every batch, where it is logged
    start: dict[str, Tensor] = field(default_factory=dict)  # the student's weights when training started
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # after every batch
    coefficients: set[torch.dtype] = field(default_factory=set)
    validations: int = 0


class Witness(pl.Callback):
    """Looks on; takes its hooks with it when training ends."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.hooks: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.run.start = weights(pl_module)
        for router in (m for m in pl_module.modules() if isinstance(m, RouterLinear)):
            look = lambda module, args, output: self.run.coefficients.add(output.dtype)  # noqa: E731
            self.hooks.append(router.register_forward_hook(look))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if "distill/loss" in trainer.callback_metrics:
            self.run.logged.append(trainer.callback_metrics["distill/loss"].item())
        named = pl_module.named_parameters()
        self.run.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.run.validations += not trainer.sanity_checking

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        while self.hooks:
            self.hooks.pop().remove()


def taught(
    module: Any,
    *callbacks: Any,
    batches: int = 4,
    data: Any = None,
    ckpt_path: Any = None,
    options: Any = None,
    ours: Any = None,
    callback: Any = None,
) -> Run:
    """Train a module beside compression to half of its MACs; ``options`` are the Trainer's, ``ours`` the callback's."""
    run = Run(module, callback or DynCompress("50%", **(ours or {})))
    run.host = trainer(callbacks=[run.callback, *callbacks, Witness(run)], **(options or {}))
    term = teaching.output_loss

    def noted(*args: Any) -> Tensor:
        value = term(*args)
        run.terms.append(value.item())
        return value

    with patch.object(teaching, "output_loss", noted):
        if data is False:  # the module has its own
            run.host.fit(module, ckpt_path=ckpt_path)
        else:
            run.host.fit(module, loader(batches) if data is None else data, loader(2), ckpt_path=ckpt_path)
    return run


def check(run: Run, steps: int | None = None, attributes: set[str] | None = None, others: tuple[str, ...] = ()) -> None:
    """The student was converted, taught and trained, and nothing of the training is left on the module.

    ``attributes`` are those of the module before, where it is no plain classifier; ``others`` what else it holds.
    """
    plan = plan_of(run.module)
    assert plan is not None and 0.49 <= plan.ratio <= 0.5
    assert sum(isinstance(m, DynamicConv) for m in run.module.modules()) == 2
    assert run.terms and all(math.isfinite(term) and term > 0 for term in run.terms)
    assert all(math.isfinite(term) and term > 0 for term in run.logged)
    if steps is not None:
        assert run.host.global_step == steps
    now = run.module.state_dict()
    banks = [name for name in now if name.endswith((".bank", "router.weight"))]
    assert len(banks) == 4
    assert all(not torch.equal(now[name], run.start[name]) for name in banks)
    assert all(value.isfinite().all() for value in now.values())
    clean(run.module, attributes, others)


def clean(module: Any, attributes: set[str] | None = None, others: tuple[str, ...] = ()) -> None:
    """No patch, no hook, no teacher, no tensor that waits for a layer."""
    known = set(vars(Classifier())) if attributes is None else attributes
    assert set(vars(module)) - known <= {"_metric_attributes"}
    handovers = [m.handover for m in module.modules() if isinstance(m, DyNetConv)]
    assert not any(handover._waiting for handover in handovers if handover is not None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(name.startswith(("net.", *others)) for name in module.state_dict())
