"""Distillation reaches the gradients of training steps that nobody edited."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyncompress.distillation import DistillConfig
from dyncompress.errors import DistillationError
from dyncompress.losses import attention_loss, logit_loss
from tests.classifiers import CLASSES, Net, loader
from tests.taught import IMAGES, Lit, difference, make_teacher, manual, plain, run

# ---- the right gradient ------------------------------------------------------------------------------------------


def kd_gradient(config: DistillConfig, lit: Any) -> dict[str, Tensor]:
    """Gradient of the output term alone, by plain autograd."""
    net = deepcopy(lit.net).train()
    with torch.no_grad():
        taught = make_teacher().network(IMAGES)
    loss = config.alpha * logit_loss(net(IMAGES), taught, config.temperature)
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


@pytest.mark.parametrize(("step", "automatic"), [(plain, True), (manual, False)], ids=["automatic", "manual"])
def test_the_gradient_is_the_users_plus_alpha_times_the_terms(step: Any, automatic: bool) -> None:
    user = run(Lit(step, automatic), config=None).gradients[0]
    for alpha in (0.0, 1.0, 3.0):
        config = DistillConfig(alpha=alpha, temperature=2.0)
        both = run(Lit(step, automatic), config).gradients[0]
        expected = kd_gradient(config, Lit())
        assert difference(both, {k: user[k] + expected[k] for k in user}).abs().max() < 1e-6


def with_dict(lit: Any, x: Tensor, y: Tensor) -> Any:
    return {"loss": plain(lit, x, y), "kept": 7}


def in_place(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = lit.net(x)
    loss = F.cross_entropy(logits, y)
    logits.detach().zero_()
    return loss


def with_evaluation(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        lit.net.eval()
        lit.net(x + 1)
        lit.net.train()
    return plain(lit, x, y)


def twice(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    """The same images in two runs: the mean of two equal terms."""
    lit.net.eval()  # so that both are equal
    return (plain(lit, x, y) + plain(lit, x, y)) / 2


def once(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    lit.net.eval()
    return plain(lit, x, y)


def by_keyword(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(lit.net(x=x), y)


def checkpointed(lit: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(checkpoint(lit.net, x, use_reentrant=False), y)


@pytest.mark.parametrize(
    ("step", "like"),
    [(with_dict, plain), (in_place, plain), (with_evaluation, plain), (twice, once), (by_keyword, plain),
     (checkpointed, plain)],
)  # fmt: skip
def test_other_habits_give_the_same_gradient(step: Any, like: Any) -> None:
    found, expected = (run(Lit(s), steps=2) for s in (step, like))
    assert difference(found.gradients[-1], expected.gradients[-1]).abs().max() < 1e-6
    assert found.logged == pytest.approx(expected.logged)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_network_gives_the_same_gradient(how: str) -> None:
    torch._dynamo.reset()
    lit = Lit()
    frames = []

    def backend(graph: Any, _: Any) -> Any:
        frames.append(graph)
        return graph.forward

    if how == "wrapped":
        lit.net = torch.compile(lit.net, backend=backend)
    else:
        lit.net.compile(backend=backend)
    for module in (lit, reference := Lit()):
        module.net(IMAGES)  # compiled before there was a hook
    found, expected = run(lit, steps=4), run(reference, steps=4)
    names = [name.removeprefix("_orig_mod.") for name in found.gradients[-1]]
    gradients = dict(zip(names, found.gradients[-1].values(), strict=True))
    assert difference(gradients, expected.gradients[-1]).abs().max() < 1e-5
    assert len(frames) == 1  # the hooks of each step do not make it compile again


def test_an_inner_checkpoint_is_recomputed_without_the_teacher() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    lit = Lit()
    lit.net = Checkpointed()
    lit.net.load_state_dict(Lit().net.state_dict())
    assert difference(run(lit).gradients[0], run(Lit()).gradients[0]).abs().max() < 1e-6


def test_gradients_accumulate_and_are_clipped_as_the_trainer_says() -> None:
    accumulated = run(Lit(once), steps=2, accumulate_grad_batches=2)
    assert len(accumulated.gradients) == 1
    single = [run(Lit(lambda lit, x, y, i=i: once(lit, *pick(i)))).gradients[0] for i in (0, 1)]
    mean = {k: (single[0][k] + single[1][k]) / 2 for k in single[0]}
    assert difference(accumulated.gradients[0], mean).abs().max() < 1e-6
    clipped = run(Lit(), steps=2, gradient_clip_val=1e-3)
    assert len(clipped.logged) == 2


def pick(index: int) -> tuple[Tensor, Tensor]:
    x, y = list(loader())[index]
    return x, y


def test_features_add_the_attention_term() -> None:
    class Answer(Lit):
        """Also tells the term, from its own forward."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            kept = []
            hook = self.net.bn1.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
            loss = super().training_step(batch, batch_idx)
            hook.remove()
            self.feature = kept[0].clone()
            return loss

    lit = Answer()
    teach = run(lit, DistillConfig(alpha=0.0, features={"bn1": 10.0}))
    _, features = make_teacher().answer((IMAGES,), {}, ["bn1"])
    assert teach.logged[0] == pytest.approx(10 * attention_loss(lit.feature, features["bn1"]).item(), rel=1e-4)
    user = run(Lit(), config=None).gradients[0]
    assert difference(teach.gradients[0], user)[: 3 * 16 * 9].abs().max() > 1e-6  # the stem feels it
    with pytest.raises(DistillationError, match="names 'bn9', which Net does not have; near: bn2, bn1"):
        run(Lit(), DistillConfig(features={"bn9": 1.0}))


class Named(Net):
    def forward(self, x: Tensor) -> Any:
        return {"out": super().forward(x), "aux": x}


def test_a_network_may_answer_with_a_dict() -> None:
    lit = Lit(lambda lit, x, y: F.cross_entropy(lit.net(x)["out"], y))
    lit.net = Named()
    lit.net.load_state_dict(Lit().net.state_dict())
    assert difference(run(lit).gradients[0], run(Lit()).gradients[0]).abs().max() < 1e-6


# ---- optimizers --------------------------------------------------------------------------------------------------


class Two(Lit):
    """A generator and a critic with an optimizer each, by hand; the critic first."""

    def __init__(self) -> None:
        super().__init__(automatic=False)
        self.critic = nn.Linear(CLASSES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        with torch.no_grad():
            fake = self.net(x)
        self.manual_backward(self.critic(fake).mean())
        self.alone = self.net.linear.weight.grad is None  # the critic's backward taught nobody
        second.step()
        second.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        first.step()
        first.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.critic)]


def test_with_two_optimizers_the_networks_own_backward_gets_the_term() -> None:
    two = Two()
    teach = run(two)
    assert two.alone
    assert len(teach.logged) == 1
    assert difference(teach.gradients[1], run(Lit(manual, automatic=False)).gradients[0]).abs().max() < 1e-6


def test_a_closure_that_runs_several_times_is_taught_every_time() -> None:
    class Closure(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    calls = []
    teacher = make_teacher()
    teacher.network.register_forward_hook(lambda *_: calls.append(1))
    run(Closure(), teacher=teacher)
    assert len(calls) >= 3


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_step_stays_skipped() -> None:
    teach = run(Lit(lambda lit, x, y: None), steps=2)
    assert not teach.logged
    assert not teach.gradients[0]
