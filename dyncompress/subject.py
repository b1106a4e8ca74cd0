"""What a recipe compresses: its module and data, built and tried out on one batch before anything is spent."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyncompress.budget import Target
from dyncompress.checkpoint import load_weights
from dyncompress.errors import RecipeError
from dyncompress.evaluation import evaluate
from dyncompress.host import find_network
from dyncompress.plan import Plan
from dyncompress.planning import make_plan
from dyncompress.recipe import Recipe, build, importable, suggest
from dyncompress.search import Found, Train, cheapest
from dyncompress.sensitivity import Progress, measure

# What the recipe decides itself, and where.
RESERVED = {"max_epochs": "epochs and baseline.epochs", "logger": "wandb", "callbacks": "distill and method"}
# Where sensitivity maps are kept: one folder for all runs, since a map serves every target and method.
MAPS = "runs/sensitivity"
# A run is a line of text per network: no bars, no summaries, no checkpoints of arms that take minutes.
TRAINER = {
    "devices": 1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "num_sanity_val_steps": 0,
}


@dataclass(frozen=True)
class Subject:
    """A LightningModule with its data, ready to be trained or compressed.

    Attributes:
        recipe: Where it comes from.
        lightning: The Lightning package that the module belongs to.
        model: The LightningModule, with the checkpoint's weights where the recipe names one.
        data: The LightningDataModule.
        path: Name of the network in the module, "" for the module itself.
        example: What the network's forward takes: the inputs of one batch.
    """

    recipe: Recipe
    lightning: Any
    model: Any
    data: Any
    path: str
    example: Any

    @classmethod
    def of(cls, recipe: Recipe) -> Subject:
        """Build a recipe's module and data and run one test batch through them.

        Raises:
            RecipeError: If a class, an argument, the checkpoint, the data or the score does not exist.
        """
        torch.manual_seed(recipe.seeds[0])
        with importable(recipe.folder):
            model, data = build(recipe.model, "model"), build(recipe.data, "data")
        lightning = lightning_of(model)
        _check_trainer(recipe, lightning)
        with quiet(lightning):
            path, network = find_network(model, recipe.module)
            if recipe.baseline.checkpoint:
                load_weights(network, recipe.baseline.checkpoint, prefix=path and f"{path}.")
            untried = cls(recipe, lightning, model, data, path, None)
            with _inputs(network) as seen:
                untried.test(model, limit_test_batches=1)
        if not seen:
            raise RecipeError(
                f"model: the test step of {type(model).__name__} never calls its network {path or 'self'!r} - one that "
                "calls it as a whole, self.net(x) or self(x) - call it so"
            )
        return cls(recipe, lightning, model, data, path, seen[0])

    def network(self, module: Any) -> nn.Module:
        """The network in the module or in a copy of it."""
        found: nn.Module = module.get_submodule(self.path)
        return found

    def trainer(self, **arguments: Any) -> Any:
        """A quiet Trainer with the recipe's settings."""
        return self.lightning.Trainer(**{**TRAINER, "logger": False, **self.recipe.trainer, **arguments})

    def test(self, module: Any, **arguments: Any) -> float:
        """The recipe's score of a module.

        Raises:
            RecipeError: If the data cannot be read, or the test step logs no such score.
        """
        return self._scored("test", "score", self.recipe.score, module, arguments)

    def validate(self, module: Any, **arguments: Any) -> float:
        """The score on validation data that a search goes by.

        Raises:
            RecipeError: If there are none, or the validation step logs no such score.
        """
        return self._scored("validation", "search.score", self.recipe.search.score, module, arguments)

    def _scored(self, stage: str, key: str, name: str, module: Any, arguments: dict[str, Any]) -> float:
        trainer = self.trainer(**arguments)
        run = trainer.test if stage == "test" else trainer.validate
        unfit: Any = import_module(f"{self.lightning.__name__}.utilities.exceptions").MisconfigurationException
        try:
            results = run(module, self.data, verbose=False)
        except unfit as error:
            raise RecipeError(
                f"{key}: no {stage} can be run ({error}) - a {stage} step and data for it - add them"
            ) from error
        except OSError as error:
            raise RecipeError(
                f"data: {type(self.data).__name__} failed with {type(error).__name__}: {error} - files that it can "
                "read - check the arguments of data"
            ) from error
        found = {name: value for result in results for name, value in result.items()}
        if name not in found:
            problem = f"the {stage} step of {type(module).__name__} logs no {name!r}"
            raise RecipeError(f"{key}: {problem}{suggest(name, found)}")
        return float(found[name])

    def plan(self, progress: Progress | None = None) -> Plan:
        """The student's plan, at the weights that the module has now; progress of what it takes measuring."""
        recipe = self.recipe
        how = {"method": recipe.method} if recipe.preset is None else {"preset": recipe.preset}
        return self._plan(how, recipe.target, recipe.options, progress)

    def plans(self, progress: Progress | None = None) -> dict[str, Plan]:
        """The student's plan, and its control's: the static network that costs as many MACs as the student."""
        return self.with_control(self.plan(progress))

    def with_control(self, student: Plan) -> dict[str, Plan]:
        """A student's plan, and its control's."""
        if not self.recipe.control or self.recipe.method == "static":
            return {"student": student}
        return {"static": self._plan({"method": "static"}, student.macs_after, {}), "student": student}

    def cheapest(self, train: Train, folder: Path, progress: Progress | None = None) -> Found:
        """The cheapest plan within the recipe's ``max_drop``, at the weights that the module has now.

        Args:
            train: As for `search.cheapest`.
            folder: Where its scores are kept.
            progress: Told of what is measured, and of every training.
        """
        recipe = self.recipe
        assert recipe.max_drop is not None
        return cheapest(
            self.network(self.model),
            self.example,
            train,
            recipe.max_drop,
            baseline=self.validate(self.model),
            config=recipe.search,
            cache=folder,
            progress=progress,
            method=recipe.method,
            options=recipe.options,
            **self._how(progress),
        )

    def check(self) -> None:
        """Raise where the plans can't be made or their data can't be read; nothing is measured."""
        recipe = replace(self.recipe, allocation="uniform", importance="magnitude")
        replace(self, recipe=recipe).plans()
        if self._measures:
            self.batches(1)
        if recipe.max_drop is not None:
            with quiet(self.lightning):
                self.validate(self.model, limit_val_batches=min(1, recipe.trainer.get("limit_val_batches", 1)))

    def batches(self, count: int) -> list[Any]:
        """The first training batches.

        Raises:
            RecipeError: If there are none.
        """
        with importable(self.recipe.folder), torch.random.fork_rng(devices=()):
            torch.manual_seed(self.recipe.seeds[0])  # a loader that shuffles gives the same batches each time
            self.data.prepare_data()
            self.data.setup("fit")
            found = list(islice(self.data.train_dataloader(), count))
        if not found:
            raise RecipeError(
                f"data: {type(self.data).__name__} has no training batch - at least one - check its arguments"
            )
        return found

    @property
    def _measures(self) -> bool:
        return self.recipe.allocation == "sensitivity" or self.recipe.importance == "taylor"

    def _plan(
        self, how: dict[str, Any], target: Target | None, options: dict[str, Any], progress: Progress | None = None
    ) -> Plan:
        how = {**how, **self._how(progress)}
        return make_plan(self.network(self.model), self.example, target, options=options, **how)

    def _how(self, progress: Progress | None) -> dict[str, Any]:
        """What `make_plan` is told of widths and channels; sensitivities are measured, where they are not there."""
        recipe, network = self.recipe, self.network(self.model)
        batches = self.batches(recipe.batches) if self._measures else []
        channels: dict[str, Any] = {"importance": recipe.importance}
        if recipe.importance == "taylor":
            channels["batches"] = batches
        sensitivity = None
        if recipe.allocation == "sensitivity":
            # Training images, and not those that the report scores: a test set must not choose widths.
            sensitivity = measure(
                network,
                self.example,
                lambda net: evaluate(net, batches),
                name=f"accuracy on {len(batches)} training batches of {recipe.data}",
                cache=MAPS,
                progress=progress,
                **channels,
            )
        return {
            "allocation": recipe.allocation,
            "sensitivity": sensitivity,
            "ignore": recipe.ignore,
            "static": recipe.static,
            "floors": recipe.floors,
            **channels,
        }


def lightning_of(model: object) -> Any:
    """The Lightning package of a module; there are two, and a Trainer takes only its own package's modules.

    Raises:
        RecipeError: If it is no LightningModule.
    """
    for kind in type(model).__mro__:
        package = kind.__module__.partition(".")[0]
        if kind.__name__ == "LightningModule" and package in ("lightning", "pytorch_lightning"):
            return import_module("lightning.pytorch" if package == "lightning" else package)
    raise RecipeError(
        f"model: {type(model).__name__} is no LightningModule - a class of pytorch_lightning or lightning.pytorch - "
        "wrap the network in one"
    )


@contextmanager
def quiet(lightning: Any) -> Iterator[None]:
    """Lightning without its advice on hardware, workers and logging intervals; warnings about errors still show."""
    # All names: with both packages imported, each logs under the name of the one that came last.
    names = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    advice = import_module(f"{lightning.__name__}.utilities.warnings").PossibleUserWarning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", advice)
        warnings.filterwarnings(
            "ignore", ".isinstance.treespec, LeafSpec", FutureWarning
        )  # Lightning 2.6 on torch 2.13
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _check_trainer(recipe: Recipe, lightning: Any) -> None:
    known = [name for name in inspect.signature(lightning.Trainer).parameters if name not in RESERVED]
    for name in recipe.trainer:
        if name in RESERVED:
            raise RecipeError(f"trainer.{name} is the recipe's own business - set {RESERVED[name]} instead")
        if name not in known:
            raise RecipeError(f"trainer: Trainer has no argument {name!r}{suggest(name, known)}")


@contextmanager
def _inputs(network: nn.Module) -> Iterator[list[Any]]:
    """The inputs of every call of the network, while the context lasts."""
    seen: list[Any] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs:
            seen.append(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))
        else:
            seen.append(args)

    handle = network.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
