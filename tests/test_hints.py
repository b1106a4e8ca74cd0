"""The kept channels of every module's output, against what the narrowed network itself returns there."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from dyncompress.answers import recorded
from dyncompress.callback import DynCompress
from dyncompress.conversion import narrowed, plan_of, resolve
from dyncompress.distillation import DistillConfig, Teacher, features_loss
from dyncompress.errors import DistillationError
from dyncompress.hints import kept_channels
from dyncompress.losses import hint_loss
from dyncompress.planning import make_plan
from tests.classifiers import Net, classifier, fit, loader
from tests.networks import BATCH_NORMED, Dense, PixelShuffle, Residual, Shuffle, ZeroPad, make


def channelwise(net: nn.Module) -> nn.Module:
    """Nothing travels between channels any more: every value follows from the biases of its own channel.

    Cutting other channels then changes nothing in those that stay, so that the narrowed network tells which they are.
    """
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.zero_() if p.dim() > 1 else p.uniform_(0.1, 2) if name.endswith("bias") else None
    return net


def returned(net: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    with torch.no_grad(), recorded(net, names) as seen:
        net(x)
    return {name: value for name, value in seen.items() if isinstance(value, Tensor)}


FAST = [ZeroPad, Dense, Shuffle, PixelShuffle]


@pytest.mark.parametrize("network", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in BATCH_NORMED])
def test_kept_channels_are_those_that_the_narrowed_network_returns(network: type[nn.Module]) -> None:
    net, x = make(network)
    channelwise(net)
    plan = resolve(net, make_plan(net, x, "50%", "static"))
    small = narrowed(net, plan)
    names = [name for name, _ in small.named_modules() if name and not name.endswith(".inner")]  # of a re-indexed pad
    ours, theirs = returned(small, x, names), returned(net, x, names)
    kept = kept_channels(net, (x,), {}, plan, list(ours))
    cut = 0
    for name, value in ours.items():
        expected = theirs[name]
        for dim, channels in kept[name]:
            expected = expected.index_select(dim, channels)
        assert torch.equal(value, expected), name
        cut += value.shape != theirs[name].shape
    assert cut >= 2


def test_channels_side_by_side_and_flattened_positions_by_hand() -> None:
    """Of 16 + 12 concatenated channels, those that stay of each part; of a vector, every position of them."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)
            self.join, self.flat, self.head = Join(), nn.Flatten(), nn.Linear(12 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.flat(self.join(self.left(x), self.right(x))))

    class Join(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b], dim=1)

    net, x = Both(), torch.randn(1, 3, 2, 2)
    with torch.no_grad():  # the best by magnitude are the last ones of each
        for conv in (net.left, net.right):
            conv.weight.copy_(torch.arange(1.0, len(conv.weight) + 1)[:, None, None, None])
    plan = resolve(net, make_plan(net, x, "50%", "static"))
    left, right = (list(k) for k in plan.keep)  # type: ignore[arg-type]
    assert left == list(range(8 - len(left), 8)) and right == list(range(4 - len(right), 4))
    kept = kept_channels(net, (x,), {}, plan, ["join", "flat", "head"])
    joined = [*left, *(8 + c for c in right)]
    assert [(d, c.tolist()) for d, c in kept["join"]] == [(1, joined)]
    assert [(d, c.tolist()) for d, c in kept["flat"]] == [(1, [4 * c + p for c in joined for p in range(4)])]
    assert kept["head"] == []


def test_the_network_is_left_as_it_was() -> None:
    net, x = make(Residual)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plan = resolve(net, make_plan(net, x, "50%"))
    kept_channels(net, (), {"x": x}, plan, ["blocks"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_teacher_that_the_student_was_not_cut_from_is_refused() -> None:
    net, x = make(Dense)
    plan = resolve(net, make_plan(net, x, "50%"))
    with pytest.raises(DistillationError, match=r"the teacher is another one: .*; use features= .* the original first"):
        kept_channels(make(Shuffle)[0], (x,), {}, plan, ["stem"])


class Term(pl.Callback):
    """What the first step's hint should be, by the networks themselves."""

    def __init__(self, callback: DynCompress, name: str) -> None:
        self.callback, self.name = callback, name

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            plan = plan_of(pl_module)
            assert plan is not None and self.callback._teacher is not None
            group = next(i for i, g in enumerate(plan.graph.groups) if g.name == "conv1")
            theirs = returned(self.callback._teacher.network, batch[0], [self.name])[self.name]
            ours = returned(pl_module.net, batch[0], [self.name])[self.name]  # in training mode: the batch's statistics
            keep = plan.keep[group]
            assert not isinstance(keep, int) and ours.shape[1] == len(keep) < theirs.shape[1]
            self.expected = hint_loss(ours, theirs[:, list(keep)]).item()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.found = trainer.callback_metrics["distill/loss"].item()


@pytest.mark.parametrize("method", ["static", "dynet"])
def test_the_callback_compares_a_student_with_its_own_channels(method: str) -> None:
    torch.manual_seed(0)
    module = classifier()()
    callback = DynCompress("50%", method=method, distill=DistillConfig(alpha=0.0, hints={"bn1": 3.0}))
    term = Term(callback, "bn1")
    fit(module, callback, term, batches=2)
    assert term.found == pytest.approx(3 * term.expected, rel=1e-4)
    assert term.found > 0.01


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_hints_are_compared_in_32_bits_whatever_the_training_is_in(precision: Any) -> None:
    """A relative error of features: 3 digits of bf16 leave it within a few percent of that of a 32-bit training."""
    found = []
    for p in (precision, "32-true"):
        torch.manual_seed(0)
        config = DistillConfig(alpha=0.0, hints={"bn1": 1.0, "conv2": 1.0})
        host = fit(classifier()(), DynCompress("50%", distill=config), batches=1, precision=p)
        found.append(host.callback_metrics["distill/loss"])
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(found[1].item(), rel=0.05)


def test_hints_work_without_a_cut() -> None:
    """A student of the original's own widths is compared as it is."""
    net, x = Net(), next(iter(loader()))[0]
    _, features = Teacher(net).answer((x,), {}, ["bn1"])
    assert features_loss(features, features, DistillConfig(hints={"bn1": 1.0})).item() == 0
