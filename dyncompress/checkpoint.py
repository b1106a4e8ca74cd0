"""Read what training left behind: plans and weights in checkpoints, and whole LightningModules from them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyncompress import files
from dyncompress.bundle import read_state
from dyncompress.conversion import convert_, plan_of, plans_in
from dyncompress.errors import CheckpointError, DynCompressError
from dyncompress.plan import Plan

SHARDED = "meta.pt"  # beside the shards of a checkpoint that is a folder: everything but the weights
_ONE_AT_A_TIME = threading.RLock()


def read_plan(path: str | Path) -> Plan:
    """The plan in a checkpoint, a bundle, or a plan's own JSON file.

    Args:
        path: ``.json``, ``.safetensors``, what ``torch.save`` wrote, or a folder that a sharded strategy wrote.

    Raises:
        PlanError: If a JSON file is missing or holds no plan.
        CheckpointError: If another file can't be read, or holds no plan or several.
    """
    path = Path(path)
    if path.suffix == ".json":
        return Plan.load(path)
    if path.is_dir():
        plan = stated_plan(read_state(path / SHARDED))
        plans = {} if plan is None else {"": plan}
    else:
        plans = plans_in(read_state(path))
    if len(plans) != 1:
        found = f"{len(plans)} plans, of {', '.join(map(repr, plans))}" if plans else "no plan"
        raise CheckpointError(
            f"'{path}' holds {found}; give a checkpoint of one converted network, or a plan's JSON file"
        )
    return next(iter(plans.values()))


def stated_plan(checkpoint: Mapping[str, Any]) -> Plan | None:
    """The plan in the state of the callback; sharded checkpoints keep their state dict elsewhere."""
    states = checkpoint.get("callbacks", {})
    text = next((s["plan"] for s in states.values() if isinstance(s, Mapping) and "plan" in s), None)
    return None if text is None else Plan.from_json(text)


def load_weights(network: nn.Module, path: str | Path, prefix: str = "") -> None:
    """Load a file's weights into a network: its own state dict, or that of a module that has it at ``prefix``.

    Args:
        network: The network; nothing is loaded when a tensor is missing or has another shape.
        path: ``.safetensors``, or what ``torch.save`` wrote: a state dict, or a dict with a ``state_dict``.
        prefix: ``"net."``, say; of use only where the file's names have it.

    Raises:
        CheckpointError: If the file can't be read, or is of another network; names the first difference.
    """
    wanted = network.state_dict()
    weights = {name.replace("_orig_mod.", ""): value for name, value in read_state(path).items()}  # compiled or not
    below = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if prefix and wanted.keys() <= below.keys():
        weights = below
    for name, value in wanted.items():
        shape = tuple(value.shape)
        found = tuple(weights[name].shape) if isinstance(weights.get(name), Tensor) else "missing"
        if found != shape:
            raise CheckpointError(
                f"'{path}' does not fit {type(network).__name__}: '{name}' is {shape}, {found} in the file; give the"
                f" weights of the original network ({len(wanted)} tensors; the file has {len(weights)})"
            )
    network.load_state_dict({name: weights[name] for name in wanted})


def load_from_checkpoint(module: Any, path: str | Path, **kwargs: Any) -> Any:
    """A LightningModule from a checkpoint that it wrote after it was compressed.

    Args:
        module: The LightningModule's class.
        path: The checkpoint.
        **kwargs: As ``LightningModule.load_from_checkpoint`` takes them. Objects beside weights are read only with
            ``weights_only=False``: their code would run.

    Returns:
        A module of that class, converted, with the checkpoint's weights.

    Raises:
        CheckpointError: If the file can't be read or holds no plan.
        PlanError: If the plan is of another network than the class builds.

    Example:
        >>> model = load_from_checkpoint(LitClassifier, "last.ckpt")  # doctest: +SKIP
    """
    if Path(path, SHARDED).is_file():
        raise CheckpointError(
            f"'{path}' is a checkpoint in pieces, one of each process; resume from it under its strategy, and save a"
            " whole one there: ModelParallelStrategy(save_distributed_checkpoint=False)"
        )
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file '{path}'; give a checkpoint that the Trainer wrote")
    if not hasattr(module, "load_from_checkpoint"):
        raise CheckpointError(f"{module!r} is no LightningModule class; for a plain network use dyncompress.load")
    files.check(path)
    careful = kwargs.pop("weights_only", True) is not False
    lightning_asks = "weights_only" in signature(module.load_from_checkpoint).parameters
    if lightning_asks:
        kwargs["weights_only"] = careful
    with _rebuilding(module, path):
        try:
            if careful and not lightning_asks:  # before 2.6 it reads anything, so that torch has to look first
                torch.load(path, map_location="cpu", weights_only=True)
            return module.load_from_checkpoint(path, **kwargs)
        except DynCompressError:
            raise
        except Exception as error:  # whatever a damaged file or the user's constructor meets; chained
            if "Unsupported global" in str(error):  # torch fills a screen
                raise CheckpointError(
                    f"'{path}' holds objects beside weights (hyperparameters of {module.__name__}, for instance), which"
                    " torch doesn't load from a file of unknown origin; pass weights_only=False where you trust it"
                ) from error
            raise CheckpointError(
                f"'{path}' can't be loaded into {module.__name__} ({files.reason(error)}); give a whole"
                " checkpoint of that class, and the arguments of its __init__ that it does not save"
            ) from error


@contextmanager
def _rebuilding(module: Any, path: str | Path) -> Iterator[None]:
    """The class with an ``on_load_checkpoint`` that converts first, while one checkpoint is loaded.

    The class itself, and no subclass: Lightning refuses a checkpoint of LightningCLI to any class but its own.
    """

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        plans = plans_in(checkpoint.get("state_dict", {}))
        if not plans:
            raise CheckpointError(
                f"'{path}' holds no plan: it was written by a module that was not compressed; read it with"
                f" {module.__name__}.load_from_checkpoint"
            )
        for prefix, plan in plans.items():
            network = network_at(self, prefix)
            if plan_of(network) is None:  # else its own __init__ converted it
                convert_(network, plan)
        original(self, checkpoint)

    with _ONE_AT_A_TIME:
        original, own = module.on_load_checkpoint, "on_load_checkpoint" in vars(module)
        module.on_load_checkpoint = on_load_checkpoint
        try:
            yield
        finally:
            if own:
                module.on_load_checkpoint = original
            else:
                del module.on_load_checkpoint


def network_at(module: nn.Module, prefix: str) -> nn.Module:
    """The network that a prefix of a checkpoint's state dict stands for.

    Raises:
        CheckpointError: If the module has no such network.
    """
    try:
        return module.get_submodule(prefix.removesuffix("."))
    except AttributeError:
        raise CheckpointError(
            f"the checkpoint's plan is of '{prefix.removesuffix('.')}', which {type(module).__name__} does not have;"
            " load it into the module that wrote it"
        ) from None
