"""Which networks teach: the original, files, other networks, or several of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from dyncompress.checkpoint import load_weights
from dyncompress.distillation import Ensemble, Teacher
from dyncompress.errors import DistillationError, shown
from dyncompress.graph import bare
from dyncompress.host import from_rank_zero
from dyncompress.student import Student

One: TypeAlias = str | Path | nn.Module
Given: TypeAlias = One | Sequence[One] | None
"""Files of the original's weights, networks, or None for the original itself."""


def listed(given: Given) -> list[One]:
    """What was given, as a list; empty for the original.

    Raises:
        DistillationError: If one of them is neither file nor network.
    """
    several: list[Any] = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for one in several:
        if not isinstance(one, (str, Path, nn.Module)):
            raise DistillationError(
                f"teacher {shown(one)} is neither a file of weights nor a network; give a path, a network, or a list of"
                " them"
            )
    if given is not None and not several:
        raise DistillationError("teacher is an empty list; leave it out for the original, or give distill=False")
    return several


def load_teacher(given: Given, student: Student, trainer: Any = None) -> Teacher:
    """The teacher, with weights that are the same on every rank. Networks that are given stay as they are.

    Args:
        given: What teaches.
        student: Not yet converted: files hold weights of its network.
        trainer: The Trainer, where there is one.

    Raises:
        CheckpointError: If a file can't be read or is of another network.
    """
    several = listed(given)
    networks = [deepcopy(bare(t) if isinstance(t, nn.Module) else student.inner) for t in several or [student.inner]]
    network = networks[0] if len(networks) == 1 else Ensemble(networks)

    def weights() -> Mapping[str, Any]:
        for source, target in zip(several, networks, strict=False):
            if not isinstance(source, nn.Module):
                load_weights(target, source, prefix=student.path and f"{student.path}.")
        return network.state_dict()

    found = from_rank_zero(trainer, weights)  # others may have built another network, or lack the file
    if trainer is not None and not trainer.is_global_zero:
        network.load_state_dict(found)
    return Teacher(network)


def check_teacher(
    teacher: Teacher | None, given: Given, restored: Mapping[str, Any], tell: Callable[[str], Any]
) -> None:
    """Compare a resumed run's teacher with the checkpoint's; take the checkpoint's weights where they are there.

    Args:
        teacher: Who teaches now, if anybody.
        given: What the user gave.
        restored: The callback's state in the checkpoint.
        tell: Told of another teacher that is there as asked.

    Raises:
        DistillationError: If it is another one, and nobody asked for that.
    """
    saved = restored.get("teacher")
    if teacher is None or saved in (None, teacher.fingerprint):
        return
    if given is not None:
        tell(f"DynCompress: teacher {teacher.fingerprint} takes the place of {saved}, as asked")
    elif "teacher_weights" in restored:
        teacher.load(restored["teacher_weights"], saved)
    else:
        raise DistillationError(
            f"the checkpoint's student was taught by network {saved}, and this one is {teacher.fingerprint}"
            " (hashes of their weights): the module was not built with the weights that training started from;"
            " pass teacher=<file or network>, or train with save_teacher=True"
        )


def known_teacher(given: Given) -> Teacher:
    """The teacher of a network that is converted already: its original is gone, and files can't be read without it.

    Raises:
        DistillationError: If not every one that is given is a network.
    """
    several = listed(given)
    networks = [deepcopy(bare(t)) for t in several if isinstance(t, nn.Module)]
    if not networks or len(networks) < len(several):
        raise DistillationError(
            "the network is converted already, so that its original can't teach it; pass the original as teacher=,"
            " or distill=False"
        )
    return Teacher(networks[0] if len(networks) == 1 else Ensemble(networks))
