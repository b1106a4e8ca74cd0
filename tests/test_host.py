"""Finding the network in LightningModules of many shapes, and what is refused before anything is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dyncompress.errors import DynCompressError, PlanError, TraceError
from dyncompress.graph import bare
from dyncompress.host import (
    NotYetError,
    check_optimizers,
    copy_holder,
    find_network,
    from_rank_zero,
    overrides,
    refuse_copies,
    refuse_spawned,
)
from tests.classifiers import Net, classifier


class Lit(pl.LightningModule):
    """Takes its children by keyword."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class LitWithForward(Lit):
    def forward(self, x: Tensor) -> Tensor:
        return x


class ConvMetric(torchmetrics.Metric):
    """As FID and LPIPS do: a metric that holds a network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3)

    def update(self, x: Tensor) -> None: ...

    def compute(self) -> Tensor:
        return torch.zeros(())


def test_the_only_child_with_convolutions_is_the_network() -> None:
    lit = LitWithForward(net=Net(), loss=nn.CrossEntropyLoss(), fid=ConvMetric())
    assert find_network(lit) == ("net", lit.net)


def test_metrics_are_not_candidates() -> None:
    with pytest.raises(NotYetError, match="Lit has no convolution"):
        find_network(Lit(metrics=torchmetrics.MetricCollection([ConvMetric()])))


def test_convolutions_of_the_module_itself_make_it_the_network() -> None:
    lit = Lit(conv=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 2))
    assert find_network(lit) == ("", lit)


def test_layers_in_a_list_are_run_by_the_module_itself() -> None:
    lit = Lit(layers=nn.ModuleList([nn.Conv2d(3, 8, 3)]))
    assert find_network(lit) == ("", lit)
    lit = Lit(layers=nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert find_network(lit) == ("layers", lit.layers)


def test_a_backbone_beside_a_head_is_no_classifier_where_the_module_has_a_forward() -> None:
    """Its outputs are features, and a softmax over features would teach the wrong thing."""
    parts = {"backbone": nn.Sequential(nn.Conv2d(3, 8, 3)), "head": nn.Linear(8, 2)}
    assert find_network(LitWithForward(**parts))[0] == ""
    assert find_network(Lit(**parts))[0] == "backbone"


def test_a_compiled_network_is_the_wrapper_and_bare_is_what_it_wraps() -> None:
    net = Net()
    lit = Lit(net=torch.compile(net, backend="eager"))
    path, found = find_network(lit)
    assert (path, found) == ("net", lit.net)
    assert bare(found) is net
    assert bare(net) is net


def test_a_path_decides() -> None:
    lit = Lit(teacher=Net(), student=nn.ModuleDict({"net": Net()}))
    assert find_network(lit, "student.net") == ("student.net", lit.student["net"])
    assert find_network(lit, "") == ("", lit)


def test_several_networks_are_listed() -> None:
    with pytest.raises(TraceError, match=r"several networks with convolutions: encoder, decoder; .* module='encoder'"):
        find_network(Lit(encoder=Net(), decoder=Net()))


def test_a_path_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(TraceError, match=r"module='nett' does not exist in Lit; near: net$"):
        find_network(Lit(net=nn.Conv2d(3, 8, 3)), "nett")
    with pytest.raises(TraceError, match="has no convolution; name a convolutional network"):
        find_network(Lit(net=nn.Linear(3, 8)), "net")


def test_overridden_means_by_the_user() -> None:
    lit = classifier()()
    assert overrides(lit, "training_step")
    assert not overrides(lit, "setup")
    assert not overrides(lit, "configure_model")
    assert not overrides(nn.Sequential(), "forward")
    assert overrides(Net(), "forward")


# ---- guards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_spawned_processes_are_refused_with_the_way_out(strategy: str) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    with pytest.raises(DynCompressError, match=r"DDPStrategy trains in processes .* callback\.attach"):
        refuse_spawned(trainer)


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_other_launchers_are_fine(strategy: str) -> None:
    refuse_spawned(pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False))


class Holder(pl.Callback):
    """A callback that keeps a module."""

    def __init__(self, held: nn.Module | None) -> None:
        self.held = held


def test_a_copy_in_another_callback_is_found() -> None:
    lit = classifier()()
    asking = Holder(AveragedModel(lit))
    for harmless in (None, lit, Net()):
        assert copy_holder(SimpleNamespace(callbacks=[Holder(harmless), asking]), lit, asking) is None
    for harmful in (AveragedModel(lit), type(lit)()):
        trainer = SimpleNamespace(callbacks=[asking, Holder(harmful)])
        with pytest.raises(DynCompressError, match=r"Holder copied the module before .* list DynCompress before it"):
            refuse_copies(trainer, lit, asking)


def test_optimizers_must_hold_every_trainable_parameter() -> None:
    net = Net()
    net.linear.requires_grad_(False)

    def check(*parameters: Any) -> None:
        optimizers = [torch.optim.SGD(list(p), lr=0.1) for p in parameters]
        check_optimizers(SimpleNamespace(optimizers=optimizers, strategy=object()), net, "net")

    trainable = [p for p in net.parameters() if p.requires_grad]
    check()  # trains nothing: Lightning allows it
    check(trainable)
    check(trainable[:3], trainable[3:])
    with pytest.raises(PlanError, match=r"no optimizer trains 1 parameters .* 'net', bn2\.bias for one"):
        check(trainable[:-1])
    with pytest.raises(PlanError, match=r"no optimizer trains 9 parameters .* 'net', stem\.0\.weight"):
        check(Net().parameters())


class TwoRanks:
    """A strategy whose broadcast hands rank 0's value to rank 1."""

    world_size = 2

    def __init__(self, rank: int, mail: list[Any]) -> None:
        self.is_global_zero, self.mail, self.strategy = rank == 0, mail, self

    def broadcast(self, value: Any) -> Any:
        if self.is_global_zero:
            self.mail.append(value)
        return self.mail[0]


def test_rank_zero_decides_for_all() -> None:
    mail: list[Any] = []
    assert [from_rank_zero(TwoRanks(rank, mail), lambda rank=rank: rank + 7) for rank in (0, 1)] == [7, 7]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(PlanError("too wide"), PlanError), (NotYetError("later"), NotYetError), (OSError("no disk"), DynCompressError)],
)
def test_the_error_of_rank_zero_is_raised_on_all(raised: Exception, expected: type[Exception]) -> None:
    def fail() -> None:
        raise raised

    mail: list[Any] = []
    for rank in (0, 1):
        with pytest.raises(expected, match=str(raised)):
            from_rank_zero(TwoRanks(rank, mail), fail)
