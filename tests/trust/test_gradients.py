"""Gradients: accumulated, clipped, recomputed or taken by hand, they are those of the loss and the distillation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

from dyncompress.errors import DistillationError, DynCompressError
from dyncompress.layers.dynet import DyNetConv
from tests.classifiers import BATCH, CLASSES, loader
from tests.trust.witness import Classifier, check, contrasting, taught


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, in units of the largest gradient."""
    assert a.keys() == b.keys() and len(a) > 10
    largest = max(value.abs().max().item() for value in b.values())
    assert largest > 0
    return max((a[name] - b[name]).abs().max().item() for name in a) / largest


def one(index: int, **options: Any) -> dict[str, Tensor]:
    """The gradient of one batch, at the student's start."""
    data = DataLoader(Subset(loader().dataset, range(index * BATCH, (index + 1) * BATCH)), batch_size=BATCH)
    run = taught(contrasting(), data=data, options=options, ours={"recalibrate": 0})
    return run.gradients[0]


def test_accumulation(record_property: Callable[..., None]) -> None:
    """Accumulated gradients are the mean of the micro batches' own, the distillation term included."""
    run = taught(contrasting(), batches=2, options={"accumulate_grad_batches": 2}, ours={"recalibrate": 0})
    check(run, steps=1)
    first, second = one(0), one(1)
    found = gap(run.gradients[1], {name: (first[name] + second[name]) / 2 for name in first})
    assert found < 1e-6
    record_property("figure", f"largest difference {found:.1e} of the largest gradient")


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(algorithm: str, record_property: Callable[..., None]) -> None:
    """Gradients are clipped with the distillation term in them, by norm and by value."""
    limit = 0.05
    free = one(0)
    norm = math.sqrt(sum(g.square().sum().item() for g in free.values()))
    assert norm > 2 * limit and any((g.abs() > limit).any() for g in free.values())
    if algorithm == "norm":
        expected = {name: g * limit / norm for name, g in free.items()}
    else:
        expected = {name: g.clamp(-limit, limit) for name, g in free.items()}
    clipped = one(0, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    found = gap(clipped, expected)
    assert found < 1e-5
    record_property("figure", f"by {algorithm}: {found:.1e} from clipping by hand")


def call(part: Any, value: Tensor, again: bool) -> Tensor:
    return checkpoint(part, value, use_reentrant=False) if again else part(value)


class Block(nn.Module):
    """A residual block: its dynamic layers share a router."""

    def __init__(self, width: int, layers_again: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.layers_again = layers_again

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(call(self.conv1, x, self.layers_again)))
        return F.relu(x + self.bn2(call(self.conv2, inner, self.layers_again)))


class Blocks(nn.Module):
    """Recomputes parts of itself in the backward pass: its block, each layer, or nothing."""

    def __init__(self, how: str, width: int = 16) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block = Block(width, how == "layers")
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(call(self.block, self.stem(x), self.how == "block").mean((2, 3)))


class Recomputing(Classifier):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.net = Blocks(how)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(call(self.net, x, self.net.how == "network"), y)


@pytest.mark.parametrize(("how", "router"), [("block", "block"), ("network", "block"), ("layers", "layer")])
def test_activation_checkpointing(how: str, router: str, record_property: Callable[..., None]) -> None:
    """Activations that are recomputed (of blocks, of the network, of single layers) give the same gradients."""
    settings = {"recalibrate": 0, "method": "dynet", "options": {"router": router}}
    plain, recomputed = (
        taught(contrasting(Recomputing, how=name), options={"limit_train_batches": 3}, ours=settings)
        for name in ("nothing", how)
    )
    check(recomputed, steps=3)
    shared = [m for m in recomputed.module.modules() if isinstance(m, DyNetConv) and m.squeeze is None]
    assert len(shared) == (router == "block")
    assert len(recomputed.terms) == 3  # not taught again while it is recomputed
    assert recomputed.terms == pytest.approx(plain.terms, rel=1e-4)
    found = max(gap(a, b) for a, b in zip(recomputed.gradients, plain.gradients, strict=True))
    assert found < 1e-4
    record_property("figure", f"{how}: largest difference {found:.1e} of the largest gradient, in 3 steps")


def test_checkpointed_one_by_one() -> None:
    """Layers that are recomputed one by one can't share a router: training stops and says what to do."""
    with pytest.raises(DynCompressError, match=r"convert with router='layer' where layers are .* checkpointed"):
        taught(contrasting(Recomputing, how="layers"), ours={"recalibrate": 0, "method": "dynet"})


# ---- other ways to optimise --------------------------------------------------------------------------------------


class Adversarial(Classifier):
    """A network and its critic, with an optimizer each, by hand; the critic first."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(CLASSES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        with torch.no_grad():
            fake = self.net(x)
        self.manual_backward(self.critic(fake).square().mean())
        assert self.net.linear.weight.grad is None  # the critic's backward taught nobody
        second.step()
        second.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        self.clip_gradients(first, 0.1, "norm")
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in self.net.parameters()))
        assert norm == pytest.approx(0.1, rel=1e-3)
        first.step()
        first.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.critic)]


def test_two_optimizers(record_property: Callable[..., None]) -> None:
    """Manual optimisation with two optimizers: both networks train, and the student's own backward is taught."""
    module = contrasting(Adversarial)
    critic = module.critic.weight.detach().clone()
    with pytest.raises(DistillationError, match="only a part of it is trained here, name that part: module='net'"):
        taught(contrasting(Adversarial))
    run = taught(module, ours={"module": "net"})
    check(run, steps=8, attributes=set(vars(Adversarial())), others=("critic.",))
    assert len(run.terms) == len(run.logged) == 4
    assert not torch.equal(module.critic.weight, critic)
    record_property("figure", f"{len(run.terms)} of 4 batches taught, {run.host.global_step} steps of both optimizers")


class Closing(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)


def test_lbfgs(record_property: Callable[..., None]) -> None:
    """An optimizer that evaluates its loss several times in a step (LBFGS) is taught in each evaluation."""
    run = taught(contrasting(Closing))
    check(run, steps=4)
    assert 4 < len(run.terms) <= 4 * 4
    record_property("figure", f"{len(run.terms)} evaluations in 4 steps, all of them taught")


# ---- memory format -----------------------------------------------------------------------------------------------


class Last(Classifier):
    """Batches and weights with their channels last."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].contiguous(memory_format=torch.channels_last), batch[1]


def test_channels_last(record_property: Callable[..., None]) -> None:
    """Batches and weights in channels-last memory format train to the same student."""
    plain = taught(contrasting())
    module = contrasting(Last).to(memory_format=torch.channels_last)
    assert module.net.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    run = taught(module)
    check(run, steps=4)
    assert run.terms == pytest.approx(plain.terms, rel=1e-3)
    other = plain.module.state_dict()
    found = max((value - other[name]).abs().max().item() for name, value in run.module.net.named_parameters("net"))
    assert found < 1e-4
    record_property("figure", f"weights {found:.1e} apart after 4 steps, terms {worst(run.terms, plain.terms):.1e}")


def worst(found: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
