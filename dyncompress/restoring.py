"""A checkpoint's plan decides: a module takes its shapes before its weights are loaded, or says why it can't."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dyncompress import files
from dyncompress.checkpoint import SHARDED, network_at, read_plan, stated_plan
from dyncompress.conversion import plan_of, plans_in
from dyncompress.errors import CheckpointError, DynCompressError
from dyncompress.graph import bare
from dyncompress.host import copy_holder, find_network, layer_holder, starts_processes
from dyncompress.patch import Patch
from dyncompress.plan import Plan
from dyncompress.student import Student


def plans_of(checkpoint: Mapping[str, Any], module: nn.Module, path: str | None) -> dict[str, Plan]:
    """Plans in a Lightning checkpoint, by the prefix of the network that each belongs to.

    Args:
        checkpoint: As Lightning loads it.
        module: The LightningModule that it is loaded into.
        path: Name of the network in it, where the user gave one.

    Raises:
        CheckpointError: If the checkpoint is of the original network and the module is converted already.
    """
    state = checkpoint.get("state_dict")
    if state is None:  # sharded: the weights are elsewhere
        stated = stated_plan(checkpoint)
        found = find_network(module, path)[0]
        return {} if stated is None else {found and f"{found}.": stated}
    plans = plans_in(state)
    if not plans and plan_of(module) is not None:
        raise CheckpointError(
            "the checkpoint holds no plan: it is of the original network, and the module is converted; load its weights"
            f" first, with {type(module).__name__}.load_from_checkpoint, and leave out ckpt_path"
        )
    return plans


def follow(
    plans: Mapping[str, Plan], trainer: Any, module: nn.Module, student: Student | None, asking: object, seed: int
) -> None:
    """Convert what a checkpoint's plans say, unless it is so already.

    Args:
        plans: From `plans_of`.
        trainer: The Trainer.
        module: The LightningModule.
        student: What was converted before, if anything.
        asking: The callback that asks.
        seed: Of the conversion.

    Raises:
        CheckpointError: If it is too late for another plan; says why, and what to do.
        PlanError: If a plan is of another network.
    """
    for prefix, plan in plans.items():
        network = bare(network_at(module, prefix))
        known = student if student is not None and student.inner is network else Student("", network)
        if not _same(known.plan, plan):
            holder = copy_holder(trainer, module, asking)
            if trainer.strategy.restore_checkpoint_after_setup:
                raise CheckpointError(_too_late(plan, _split_by(trainer)))
            if holder:
                raise CheckpointError(_too_late(plan, f"{holder} has copied the module"))
            if noted := layer_holder(trainer, module):
                raise CheckpointError(_too_late(plan, f"{noted} has noted its layers"))
            if trainer.state.fn == "fit" and starts_processes(trainer):  # their weights come back to the module here
                raise CheckpointError(_too_late(plan, f"{type(trainer.strategy).__name__} trains a copy of the module"))
            if known.plan is not None and known.original is None:
                raise CheckpointError(_too_late(plan, "the original is gone"))
            known.convert(plan, seed)


def careful_loading(trainer: Any, module: nn.Module) -> Patch:
    """Have a Trainer refuse a file that is damaged or no checkpoint before anything of it is loaded, with the reason.

    Args:
        trainer: The Trainer; its strategy is patched.
        module: What the checkpoint is for.
    """

    def load(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).is_file():
            files.check(path)
        if trainer.strategy.restore_checkpoint_after_setup:
            refuse_other_plan(trainer, module, path)
        try:
            checkpoint = patch.original(path, *args, **kwargs)
        except DynCompressError:
            raise
        except Exception as error:  # whatever torch's reader meets in a file of any kind; chained
            raise CheckpointError(
                f"'{path}' can't be loaded ({files.reason(error)}); give a checkpoint that the Trainer wrote"
            ) from error
        if not isinstance(checkpoint, Mapping) or not {"state_dict", "pytorch-lightning_version"} & checkpoint.keys():
            raise CheckpointError(
                f"'{path}' is no checkpoint of a Trainer: it holds no module's state dict; give a checkpoint that the"
                " Trainer wrote, or load plain weights into the module before training"
            )
        return checkpoint

    patch = Patch(trainer.strategy, "load_checkpoint", load)
    return patch


def refuse_other_plan(trainer: Any, module: nn.Module, path: Any) -> None:
    """Raise when a strategy that splits the module before it loads is about to load other shapes into the pieces.

    It would fail in the middle of that, in no clear words.

    Raises:
        CheckpointError: If the checkpoint at ``path`` holds another plan than the module, or none.
    """
    if Path(path).is_file() or Path(path, SHARDED).is_file():  # else remote, missing, or of a format of its own
        plan = read_plan(path)
        if not _same(plan_of(module), plan):
            raise CheckpointError(_too_late(plan, _split_by(trainer)))


def _same(one: Plan | None, other: Plan) -> bool:
    return one is not None and one.to_json() == other.to_json()


def _split_by(trainer: Any) -> str:
    return f"{type(trainer.strategy).__name__} has split the module"


def _too_late(plan: Plan, problem: str) -> str:
    return (
        f"the checkpoint's plan ({plan.target}, {plan.method}) differs from the module's, and {problem}, so that it"
        " can't follow; pass plan=<the checkpoint> to DynCompress, with a newly built module"
    )
