"""Keep a student: weights and plan in one file, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from dyncompress import files
from dyncompress.conversion import convert, plan_of, plans_in
from dyncompress.errors import CheckpointError


def save(student: nn.Module, path: str | Path) -> Path:
    """Write a student as one safetensors file: its weights and its plan, sealed by a hash that `load` checks.

    Args:
        student: A converted network (or a module that holds one).
        path: File to write; an existing one is replaced in one step, or not at all.

    Returns:
        The path.

    Raises:
        CheckpointError: If the network was not converted.
        WriteError: If the file can't be written.
    """
    if plan_of(student) is None:
        raise CheckpointError(
            f"{type(student).__name__} carries no plan; save what dyncompress converted, or use torch.save"
        )
    path = Path(path)
    files.write(path, lambda part: _fill(student, part))
    return path


def _fill(student: nn.Module, part: Path) -> None:
    try:
        save_model(student, str(part), metadata={"format": "pt", **files.SEAL})
    except SafetensorError as error:  # how it tells of a full disk
        raise OSError(str(error)) from error
    files.seal(part)


def load(path: str | Path, net: nn.Module) -> nn.Module:
    """A student from a bundle or a checkpoint.

    Args:
        path: What `save` wrote, or any checkpoint of a converted network (Lightning's, full or weights only).
        net: The original network, trained or not: its architecture is rebuilt from the plan, its weights are replaced.

    Returns:
        The student, a new network.

    Raises:
        CheckpointError: If the file can't be read or holds no plan, or its weights don't fit.
        PlanError: If the plan was made for another network.
    """
    state = read_state(path)
    plans = plans_in(state)
    if not plans:
        raise CheckpointError(f"'{path}' holds no plan: it was not written from a network that dyncompress converted")
    if len(plans) > 1:
        raise CheckpointError(
            f"'{path}' holds {len(plans)} converted networks ({', '.join(map(repr, plans))}); save them one by one"
        )
    prefix, plan = next(iter(plans.items()))
    student = convert(net, plan)
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    expected = student.state_dict()  # once: with the plan in it, it is no cheap thing to ask for
    missing = set(expected) - set(own) - _aliases(student)
    if missing:
        raise CheckpointError(
            f"'{path}' lacks {sorted(missing)[:3]} of {type(net).__name__}; it belongs to another network"
        )
    for name, value in expected.items():
        found = own.get(name, value)
        if name.endswith("._extra_state") and isinstance(found, Tensor):
            continue  # the plan, which may be an earlier version's text: it compares itself
        if not isinstance(found, Tensor) or found.shape != value.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise CheckpointError(
                f"'{path}' does not fit {type(net).__name__}: '{name}' is {tuple(value.shape)} by its plan, and"
                f" {shape} in the file; it was put together from several, take another copy"
            )
    student.load_state_dict(own, strict=False)  # of a layer that is held back there is more than of a new one
    return student


def _aliases(net: nn.Module) -> set[str]:
    """Names under which a tensor appears again: safetensors keeps each tensor once."""
    seen: set[int] = set()
    again = set()
    for name, tensor in net.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            again.add(name)
        seen.add(id(tensor))
    return again


def read_state(path: str | Path) -> Mapping[str, Any]:
    """The state dict in a safetensors file or a torch checkpoint, read without running any code of it.

    Raises:
        CheckpointError: If there is no such file, or it is damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file '{path}'; give a bundle that dyncompress.save wrote, or a checkpoint")
    files.check(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"'{path}' can't be read ({error}); it is truncated, damaged or no checkpoint") from None
    except Exception as error:  # torch raises pickle.UnpicklingError for foreign classes, and whatever its reader meets
        raise CheckpointError(f"'{path}' can't be read as weights only ({files.reason(error)})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"'{path}' holds no state dict but a {type(content).__name__}")
    return state
