"""The network's input is seen in LightningModules of many habits, and seeing it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from dyncompress import DynCompress
from dyncompress.errors import TraceError
from dyncompress.graph import as_call
from dyncompress.host import NotYetError, overrides
from dyncompress.inputs import example_of, training_inputs
from tests.classifiers import BATCH, Net, classifier, loader, trainer

FIRST = next(iter(loader()))[0]  # the first batch of images


class Base(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Positional(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class WithoutIndex(Base):
    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Normalising(Base):
    """The network does not see what the module's forward takes."""

    example_input_array = torch.zeros(2, 8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.permute(0, 3, 1, 2) + 1)


class Logging(Base):
    """Logs, and switches between optimizers, before it calls the network."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.log("size", float(len(batch[0])))
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.net(batch[0]).sum())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("size", float(len(batch[0])))
        self.net(batch[0])


class Swallowing(Base):
    """Catches every error of its network."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        try:
            return self.net(batch[0]).sum()
        except Exception:  # noqa: BLE001 - the habit under test
            return torch.zeros(())


class Iterating(Base):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        (x, _), _, _ = next(dataloader_iter)
        return self.net(x).sum()


class Named(Base):
    """Batches are dicts, and the network takes keywords."""

    class Inner(Net):
        def forward(self, x: Tensor, flip: bool = False, scale: float = 1.0) -> Tensor:
            return super().forward(x * scale)

    def __init__(self) -> None:
        super().__init__()
        self.net = self.Inner()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["image"], scale=2.0).sum()


class Augmenting(Positional):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return F.pad(x, (1, 1, 1, 1)) + torch.rand(1), y


def seen(module: Any, data: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example that is found, as setup would find it."""
    found = []

    class Look(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            found.append(example_of(trainer, pl_module, pl_module.net))
            trainer.should_stop = True

    fit(module, [Look()], loader() if data is None else data, limit_train_batches=0)
    return as_call(found[0])


def fit(module: Any, callbacks: list[Any], data: Any, **options: Any) -> None:
    validation = (loader(1),) if overrides(module, "validation_step") else ()
    trainer(callbacks=callbacks, **options).fit(module, data, *validation)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize("module", [Positional, WithoutIndex, Logging, Swallowing, Iterating])
def test_the_first_batch_is_seen_at_the_networks_door(module: type[Any]) -> None:
    args, kwargs = seen(module())
    assert torch.equal(args[0], FIRST)
    assert len(args) == 1
    assert not kwargs


def test_keywords_are_seen_and_positions_named() -> None:
    images = [{"image": x, "label": y} for x, y in loader().dataset]
    args, kwargs = seen(Named(), DataLoader(images, batch_size=BATCH))
    assert not args
    assert kwargs.keys() == {"x", "scale"}
    assert torch.equal(kwargs["x"], FIRST)
    assert kwargs["scale"] == 2


def test_the_example_array_goes_through_the_modules_forward() -> None:
    module = Normalising()
    (x,) = example_of(None, module, module.net)
    assert torch.equal(x, torch.ones(2, 3, 8, 8))
    assert torch.equal(example_of(None, module, module), module.example_input_array)


def test_batches_are_transferred_as_the_user_says() -> None:
    (x,), _ = seen(Augmenting())
    assert x.shape == (BATCH, 3, 10, 10)


class TwoLoaders(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["b"][0]).sum()


@pytest.mark.parametrize(
    "combine",
    [dict, CombinedLoader, lambda loaders: CombinedLoader(loaders, "min_size")],
    ids=["dict", "combined", "min_size"],
)
def test_combined_loaders_give_combined_batches(combine: Callable[[Any], Any]) -> None:
    (x,), _ = seen(TwoLoaders(), combine({"a": loader(1), "b": loader(2)}))
    assert torch.equal(x, FIRST)


def test_a_list_of_loaders_gives_lists() -> None:
    class Second(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[1][0]).sum()

    (x,), _ = seen(Second(), [loader(1), loader(2)])
    assert torch.equal(x, FIRST)


def test_the_example_takes_the_networks_precision() -> None:
    (x,), _ = seen(Positional().double())
    assert x.dtype == torch.float64


def test_randomness_and_the_network_stay_as_they_were() -> None:
    module = Augmenting()
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(loader().dataset, batch_size=BATCH, shuffle=True, generator=generator)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), generator.get_state()
    found = []

    class Look(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            found.append(example_of(trainer, pl_module, pl_module.net))
            now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), generator.get_state()
            assert torch.equal(now[0], states[0])
            assert now[1:3] == states[1:3]
            assert torch.equal(now[3], states[3])

    trainer(callbacks=[Look()], limit_train_batches=0).fit(module, data)
    assert found
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert vars(module).keys().isdisjoint({"log", "log_dict", "training_step"})


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_network_is_not_run_and_not_compiled(how: str) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the network was compiled to look at its input")

    module = Positional()
    if how == "wrapped":
        module.net = torch.compile(module.net, backend=never)
    else:
        module.net.compile(backend=never)
    (x,), _ = seen(module)
    assert torch.equal(x, FIRST)
    assert (vars(module.net).get("_compiled_call_impl") is not None) == (how == "in place")


# ---- what can't be seen ------------------------------------------------------------------------------------------


def test_a_step_that_calls_the_layers_is_told_which() -> None:
    class Bypassing(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net.stem(batch[0]).sum()

    module = Bypassing()
    with pytest.raises(TraceError, match=r"it calls 'stem', a part of the network.*; name the network"):
        seen(module)
    assert module.net.stem[1].num_batches_tracked == 0  # stopped before BatchNorm


def test_every_step_says_why_it_failed() -> None:
    class Broken(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return batch[2]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.raises(
        TraceError, match=r"training_step fails with IndexError: .*; validation_step does not call it; name the"
    ):
        seen(Broken())


def test_no_batch_and_no_trainer_are_told() -> None:
    class Nothing(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(TraceError, match="train_dataloader has no batch"):
        seen(Positional(), DataLoader(Nothing()))
    module = Positional()
    with pytest.raises(TraceError, match=r"no example_input_array, and there is no Trainer .* pass example="):
        example_of(None, module, module.net)


def test_data_that_is_not_there_yet_may_come_later() -> None:
    class Late(Positional):
        def train_dataloader(self) -> Any:
            return self.data  # made in setup()

    module = Late()
    found = []

    class Look(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            with pytest.raises(NotYetError, match=r"train_dataloader fails before training .AttributeError"):
                example_of(trainer, pl_module, pl_module.net)
            found.append(True)
            pl_module.data = loader()

    trainer(callbacks=[Look()], limit_train_batches=0).fit(module)
    assert found


# ---- while training starts ---------------------------------------------------------------------------------------


class Start(pl.Callback):
    def __init__(self, count: int) -> None:
        self.count = count
        self.found: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = training_inputs(trainer, pl_module, pl_module.net, self.count)


def test_inputs_of_the_first_batches_are_seen_when_training_starts() -> None:
    start = Start(count=3)
    fit(classifier()(), [start], loader(), limit_train_batches=1)
    assert len(start.found) == 3
    for (x,), (expected, _) in zip(start.found, loader(), strict=False):
        assert torch.equal(x, expected)


def test_fewer_batches_are_all_of_them() -> None:
    start = Start(count=9)
    fit(classifier()(), [start], loader(2), precision="bf16-true")
    assert [x.dtype for (x,) in start.found] == [torch.bfloat16] * 2


def test_with_manual_optimisation_only_the_validation_step_is_looked_at() -> None:
    """A training step may update another network on its way."""

    class Two(Logging):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.other.weight.data += 1
            super().training_step(batch, batch_idx)

    module, start = Two(), Start(count=2)
    before = module.other.weight.item()
    fit(module, [start], loader(), limit_train_batches=1)
    assert len(start.found) == 2
    assert module.other.weight.item() == pytest.approx(before + 1)  # by the one real step


@pytest.mark.parametrize("combined", [False, True])
def test_persistent_workers_feed_the_training_from_its_first_batch(combined: bool) -> None:
    """They serve one iterator, and whoever asks for another rewinds it: the look at the data took the training's."""

    class Seen(classifier()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch = batch["a"] if combined else batch
            steps.append(float(batch[0].sum()))
            return super().training_step(batch, batch_idx)

    data = DataLoader(loader(6).dataset, BATCH, num_workers=1, multiprocessing_context="fork", persistent_workers=True)
    given = CombinedLoader({"a": data}, "min_size") if combined else data
    steps: list[float] = []
    host = trainer(callbacks=[DynCompress("50%", example=torch.zeros(1, 3, 8, 8), recalibrate=3)])
    host.fit(Seen(), given, loader(1))
    assert host.global_step == 6
    assert steps[-6:] == [float(x.sum()) for x, _ in loader(6)]
