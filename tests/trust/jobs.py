"""What the processes of tests/trust/test_strategies.py run: ``python jobs.py <job> <folder> [argument]``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

from dyncompress import DynCompress
from dyncompress.conversion import plan_of
from dyncompress.distillation import DistillConfig, fingerprint
from dyncompress.errors import CheckpointError, DynCompressError
from tests.classifiers import BATCH, Net, classifier, equal, fit, loader, trainer, weights

Classifier = classifier()


class Plain(Classifier):  # type: ignore[valid-type, misc]
    """Spawned processes look their classes up by name."""


EXAMPLE = torch.zeros(1, 3, 8, 8)


def rank() -> int:
    """Of this process, before there is a process group."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


def tell(folder: Path, name: str, **facts: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(facts))


def built(seed: int = 0) -> Any:
    """A newly built module; the same seed builds the same weights, as loading pretrained ones would."""
    torch.manual_seed(seed)
    return Plain()


# ---- one decision ------------------------------------------------------------------------------------------------


def agree(folder: Path) -> None:
    """Every process builds other weights, so that left alone they would choose other channels."""
    module, callback = built(seed=rank()), DynCompress("50%")
    before = fingerprint(module.net)
    host = trainer(callbacks=[callback], strategy="ddp", devices=2)
    host.fit(module, loader(), loader(1))
    tell(
        folder, f"rank{rank()}", before=before, after=fingerprint(module), plan=plan_of(module).to_json(),
        told=callback.state_dict()["teacher"], teacher=fingerprint(callback._teacher.network),
        term=host.callback_metrics["distill/loss"].item(), steps=host.global_step,
    )  # fmt: skip


# ---- gradients ---------------------------------------------------------------------------------------------------

CONFIGS: dict[str, Any] = {
    "outputs": DistillConfig(),
    "features": DistillConfig(features={"stem": 10.0, "bn1": 5.0}),
    "none": False,
}


class Measure(pl.Callback):
    """Takes the network off its start, holds BatchNorm still, and keeps the first gradients."""

    gradients: dict[str, Tensor]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for part in pl_module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.eval()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def gradients(devices: int, config: Any) -> dict[str, Tensor]:
    """Of the first step on one batch of 2 * BATCH images, which the devices share."""
    measure = Measure()
    callbacks = [DynCompress("50%", distill=config, recalibrate=0), measure]
    strategy = "ddp" if devices > 1 else "auto"
    data = DataLoader(loader(2).dataset, batch_size=2 * BATCH // devices)
    host = trainer(callbacks=callbacks, strategy=strategy, devices=devices, max_steps=1, limit_val_batches=0)
    host.fit(built(), data, loader(1))
    return measure.gradients


def share_gradients(folder: Path) -> None:
    for name, config in CONFIGS.items():
        torch.save(gradients(2, config), folder / f"{name}.{rank()}.pt")


# ---- checkpoints -------------------------------------------------------------------------------------------------


class Look(pl.Callback):
    """Keeps the fingerprint of the weights that training starts from, and its step."""

    step, start = -1, ""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.step, self.start = trainer.global_step, fingerprint(whole(pl_module))


def whole(module: torch.nn.Module) -> Any:
    """A holder of the module's parameters with every split one put together."""

    class Holder:
        def state_dict(self) -> dict[str, Tensor]:
            return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in module.named_parameters()}

    return Holder()


def save_and_use(folder: Path) -> None:
    """DDP: train and save; then resume, validate, test and predict with modules built from other weights."""
    options = {"strategy": "ddp", "devices": 2}
    first = trainer(callbacks=[DynCompress("50%", save_teacher=True)], **options)
    first.fit(built(), loader(), loader(1))
    path = folder / "ddp.ckpt"
    first.save_checkpoint(path)
    saved = fingerprint(first.lightning_module)
    facts: dict[str, Any] = {"saved": saved}

    facts["parameters"] = fingerprint(whole(first.lightning_module))
    look, module = Look(), built(seed=1)
    host = trainer(callbacks=[DynCompress("25%"), look], max_epochs=2, **options)
    host.fit(module, loader(), loader(1), ckpt_path=path)
    facts |= {"start": look.start, "step": look.step, "steps": host.global_step, "end": fingerprint(module)}
    facts["term"] = host.callback_metrics["distill/loss"].item()

    for stage in ("validate", "test", "predict"):
        module = built(seed=1)
        host = trainer(callbacks=[DynCompress("25%")], **options)
        answer = getattr(host, stage)(module, loader(2), ckpt_path=path)
        if stage == "predict":
            torch.save(torch.cat(answer), folder / f"predicted.{rank()}.pt")
        facts[stage] = fingerprint(module)
    tell(folder, f"rank{rank()}", **facts)


class Sharded(Classifier):  # type: ignore[valid-type, misc]
    """Splits its network as the user decides."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Lazy(Sharded):
    """Builds its network where it splits it."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        self.net = Net()
        super().configure_model()


def sharded(module: Any, *callbacks: Any, as_folder: bool = False, ckpt_path: Any = None, **options: Any) -> Any:
    split = pl.strategies.ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=as_folder
    )
    host = trainer(callbacks=callbacks, strategy=split, devices=2, **options)
    host.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    return host


def built_sharded(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Sharded()


def shard_and_save(folder: Path) -> None:
    for name, as_folder in (("full.ckpt", False), ("folder.ckpt", True)):
        module = built_sharded()
        host = sharded(module, DynCompress("50%"), as_folder=as_folder)
        host.save_checkpoint(folder / name)
        parts = [p.to_local().numel() for p in module.parameters()]
        tell(
            folder, f"{name.partition('.')[0]}.{rank()}", weights=fingerprint(whole(module)), steps=host.global_step,
            local=sum(parts), full=sum(p.numel() for p in module.parameters()), plan=plan_of(module).to_json(),
            term=host.callback_metrics["distill/loss"].item(), teacher=host.callbacks[0].state_dict()["teacher"],
        )  # fmt: skip


def shard_and_resume(folder: Path) -> None:
    """Without and with an interruption, and with another target than the checkpoint's."""
    module = built_sharded()
    sharded(module, DynCompress("50%"), max_epochs=2)
    uninterrupted = fingerprint(whole(module))
    for name in ("full", "folder"):
        path, look, module = folder / f"{name}.ckpt", Look(), built_sharded()
        host = sharded(module, DynCompress("50%"), look, max_epochs=2, ckpt_path=path)
        facts = {"start": look.start, "step": look.step, "steps": host.global_step, "end": fingerprint(whole(module))}
        facts["term"] = host.callback_metrics["distill/loss"].item()
        try:
            sharded(built_sharded(), DynCompress("25%"), max_epochs=2, ckpt_path=path)
        except CheckpointError as error:
            facts["refused"] = str(error)
        look, module = Look(), built_sharded()
        sharded(module, DynCompress(plan=path), look, max_epochs=2, ckpt_path=path)
        facts["by_plan"] = look.start
        tell(folder, f"resumed.{name}.{rank()}", uninterrupted=uninterrupted, **facts)


def shard_lazily(folder: Path) -> None:
    """A network that is split before anybody could convert it."""
    fail(folder, lambda: sharded(Lazy(), DynCompress("50%")))


# ---- processes that are started from one ---------------------------------------------------------------------------


class Tell(pl.Callback):
    """Tells from inside a process that the Trainer started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        term = trainer.callback_metrics["distill/loss"].item()
        tell(self.folder, f"worker{trainer.global_rank}", fingerprint=fingerprint(pl_module), term=term)


def start_others_wrongly(folder: Path, strategy: str) -> None:
    """Without attach, and with a checkpoint of other shapes than those that were attached."""
    options = {"strategy": strategy, "devices": 2}
    untouched = built()
    before = weights(untouched)
    try:
        trainer(callbacks=[DynCompress("50%")], **options).fit(untouched, loader(), loader(1))
    except ProcessRaisedException as error:  # its message is the traceback in the process
        tell(folder, "refused", message=str(error), untouched=equal(untouched, before))

    other = built()
    trainer(callbacks=[DynCompress("25%")]).fit(other, loader(), loader(1))
    other.trainer.save_checkpoint(folder / "other.ckpt")
    module, callback = built(), DynCompress("50%")
    callback.attach(module, EXAMPLE)
    try:
        host = trainer(callbacks=[callback], max_epochs=2, **options)
        host.fit(module, loader(), loader(1), ckpt_path=folder / "other.ckpt")
    except ProcessRaisedException as error:
        tell(folder, "other_plan", message=str(error))


def start_others(folder: Path, strategy: str) -> None:
    options = {"strategy": strategy, "devices": 2}

    module, callback = built(), DynCompress("50%", save_teacher=True)
    callback.attach(module, EXAMPLE)
    start = fingerprint(module)
    host = trainer(callbacks=[callback, Tell(folder)], **options)
    host.fit(module, loader(), loader(1))
    trained, parameters = fingerprint(module), fingerprint(whole(module))
    # An error of ours before the first step of a later run must not take the trained weights away.
    try:
        broken = TensorDataset(torch.full((4, 3, 8, 8), torch.nan), torch.zeros(4, dtype=torch.long))
        trainer(callbacks=[callback]).fit(module, DataLoader(broken, batch_size=4), loader(1))
    except DynCompressError as error:
        problem = str(error)
    later = fingerprint(whole(module))
    tell(
        folder, "main", start=start, fingerprint=trained, parameters=parameters, later_parameters=later,
        problem=problem, ratio=plan_of(module).ratio,
    )  # fmt: skip


# ---- errors ------------------------------------------------------------------------------------------------------


def fail(folder: Path, train: Callable[[], Any]) -> None:
    """Tell what training raises, and end with it."""
    try:
        train()
    except Exception as error:
        tell(folder, f"rank{rank()}", kind=type(error).__name__, message=str(error))
        raise


def ask_too_much(folder: Path) -> None:
    fail(folder, lambda: fit(built(), DynCompress("0.01%"), strategy="ddp", devices=2))


def miss_the_teacher(folder: Path, lacking: str) -> None:
    """The file is there in one process only."""
    path = folder / f"teacher{rank()}.pt"
    if str(rank()) not in lacking:
        torch.save(built().state_dict(), path)
    callback = DynCompress("50%", teacher=path)
    fail(folder, lambda: fit(built(), callback, strategy="ddp", devices=2))
    tell(folder, f"rank{rank()}", teacher=callback.state_dict()["teacher"])


def meet_nan(folder: Path, where: str) -> None:
    """The data of one process is broken."""

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_rank == int(where) and batch_idx == 1:
                batch[0].fill_(torch.nan)

    fail(folder, lambda: fit(built(), DynCompress("50%"), Break(), strategy="ddp", devices=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
