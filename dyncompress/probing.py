"""`search.cheapest` inside ``Trainer.fit``: short trainings of copies of the user's module, on its own data.

Every training has a Trainer of its own, on one device, with the outer one's precision, limits, clipping and
accumulation; without its loggers, checkpoints and callbacks. The module, its data and all random number generators are
afterwards what they were.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from copy import copy, deepcopy
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import nn

from dyncompress.allowance import Drop, SearchConfig
from dyncompress.errors import SearchError
from dyncompress.graph import bare
from dyncompress.host import find_network, overrides
from dyncompress.inputs import same_randomness
from dyncompress.plan import Plan
from dyncompress.search import Found, cheapest, told
from dyncompress.sensitivity import measure

_SAME = ("precision", "limit_train_batches", "limit_val_batches", "accumulate_grad_batches", "gradient_clip_val",
         "gradient_clip_algorithm")  # fmt: skip
_QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Asking(Protocol):
    """What the callback that asks for a search says of it."""

    module: str | None
    max_drop: Drop | None
    search: SearchConfig
    distill: Any
    teacher: Any
    example: Any
    warm_start: Any
    warmup: float
    recalibrate: int


def search_in_fit(trainer: Any, module: Any, asking: Asking, example: Any, how: dict[str, Any]) -> Found:
    """Find the cheapest plan within a drop, before the training that is about to start.

    Args:
        trainer: The Trainer that is about to train; its datamodule is set up.
        module: The LightningModule, not yet converted; left as it is.
        asking: The callback.
        example: What the network's ``forward`` takes.
        how: Further arguments of `make_plan`; with the sensitivity allocation the map is measured here.

    Raises:
        SearchError: If there are several processes or no validation data, or no such score is logged.
    """
    if trainer is None:
        raise SearchError("max_drop takes trainings, and there is no Trainer yet; leave attach out, or give a plan")
    if trainer.world_size > 1:
        raise SearchError(
            f"max_drop takes trainings in one process, and this Trainer has {trainer.world_size}; search once with"
            " devices=1 or a recipe, and pass what it finds as plan="
        )
    assert asking.max_drop is not None
    config, lab = asking.search, _Lab(trainer, module, asking.search.score)
    path, network = find_network(module, asking.module)
    learns = {name: getattr(asking, name) for name in ("teacher", "example", "warm_start", "recalibrate", "warmup")}
    learns["distill"] = asking.distill or False
    told_apart = {name: value for name, value in learns.items() if name != "example"}
    what = f"{type(module).__name__} {dict(module.hparams)} {lab.options} {told_apart}"

    def train(plan: Plan, epochs: int, seed: int) -> float:
        subject = lab.copied(seed)
        lab.fit(subject, epochs, type(asking)(plan=plan, module=asking.module, seed=seed, **learns))  # type: ignore[call-arg]
        return lab.score(subject)

    def cut(net: nn.Module) -> float:
        subject = lab.copied(0)
        parent, _, child = path.rpartition(".")
        setattr(subject.get_submodule(parent), child, net)
        return lab.score(subject)

    shown = trainer.progress_bar_callback is not None
    with same_randomness(), told(Console(), "max_drop") if shown else nullcontext() as progress:
        baseline = lab.score(lab.copied(0))
        if how.get("allocation") == "sensitivity":
            if not path:
                raise SearchError(
                    f"sensitivity is measured by putting narrowed networks into {type(module).__name__}, which is the"
                    " network itself; choose allocation='uniform' or 'importance'"
                )
            name, by = f"{config.score} {baseline:.4g} {lab.options}", how.get("importance", "magnitude")
            found = measure(
                bare(network), example, cut, name=name, importance=by, cache=config.cache, progress=progress
            )
            how = {**how, "sensitivity": found}
        return cheapest(
            bare(network), example, train, asking.max_drop, baseline=baseline, config=config, cache=config.cache,
            what=what, progress=progress, **how,
        )  # fmt: skip


class _Lab:
    """Trains and scores copies of a module."""

    def __init__(self, trainer: Any, module: Any, name: str) -> None:
        self.outer, self.module, self.name = trainer, module, name
        if (
            not overrides(module, "validation_step")
            or not trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
        ):
            raise SearchError(
                f"max_drop goes by a score on validation data, and {type(module).__name__} has no validation_step, or"
                " the Trainer no validation data; add them, or ask for a target"
            )
        self.options = {name: getattr(trainer, name) for name in _SAME}
        place = trainer.strategy.root_device
        kind = {"cuda": "gpu"}.get(place.type, place.type)
        self.where = {"accelerator": kind, "devices": [place.index or 0] if kind == "gpu" else 1}

    def copied(self, seed: int) -> Any:
        """A copy of the module that knows no Trainer; what is random from here on is so by the seed."""
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(seed)
        return deepcopy(self.module, {id(self.outer): None})

    def fit(self, subject: Any, epochs: int, callback: Any) -> None:
        """Train a copy."""
        host = self._trainer(max_epochs=epochs, callbacks=[callback])
        host.fit(subject, **self._data("train"))
        if host.interrupted:  # some releases of Lightning return after Ctrl-C as if all were well
            raise KeyboardInterrupt

    def score(self, subject: Any) -> float:
        """Validate a copy."""
        results = self._trainer().validate(subject, verbose=False, **self._data("val"))
        found = {key: value for result in results for key, value in result.items()}
        if self.name not in found:
            raise SearchError(
                f"the validation step of {type(self.module).__name__} logs no {self.name!r}; it logs"
                f" {', '.join(found) or 'nothing'}: name one of them, higher for a better network, with"
                " search=SearchConfig(score=...)"
            )
        return float(found[self.name])

    def _trainer(self, **arguments: Any) -> Any:
        kind = next(
            c for c in type(self.outer).__mro__ if c.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
        )
        package = "pytorch_lightning" if kind.__module__.startswith("pytorch_lightning") else "lightning.pytorch"
        return import_module(package).Trainer(**{**_QUIET, **self.options, **self.where, **arguments})

    def _data(self, stage: str) -> dict[str, Any]:
        """Arguments for a Trainer: the datamodule, which is set up once and for all, or the loaders."""
        data = self.outer.datamodule
        if data is not None:
            data = copy(data)
            data.trainer = None
            for hook in ("prepare_data", "setup", "teardown"):
                vars(data)[hook] = lambda *args, **kwargs: None
            return {"datamodule": data}
        loop = self.outer.fit_loop
        validation = loop.epoch_loop.val_loop._data_source.dataloader()
        if stage == "val":
            return {"dataloaders": validation}
        return {"train_dataloaders": loop._data_source.dataloader(), "val_dataloaders": validation}
