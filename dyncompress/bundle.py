"""Ship a student: weights and plan in one file, without pickle, and exports that are checked before they count."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dyncompress import files
from dyncompress.conversion import convert, plan_of, plans_in
from dyncompress.errors import CheckpointError, ExportError
from dyncompress.folding import fold
from dyncompress.graph import as_call, one_image

_TOLERANCE = 1e-4  # largest relative difference between an exported file's outputs and torch's


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
    student.load_state_dict({k: v for k, v in own.items() if k in expected}, strict=False)
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


def export(student: nn.Module, path: str | Path, example: Any) -> Path:
    """Write a student for deployment, BatchNorm folded, and check the file against torch before it counts.

    Args:
        student: A converted network.
        path: ``*.onnx``: batch 1, checked in onnxruntime. ``*.pt2``: `torch.export` with a dynamic batch, checked at
            batch 1, 3 and 8.
        example: What its ``forward`` takes; the leading dimension of its tensors is the batch.

    Returns:
        The path. Nothing is left there when the check fails.

    Raises:
        ExportError: If the format is unknown, a needed package is missing, or the file's outputs differ.
        WriteError: If the file can't be written.
    """
    path = Path(path)
    writers: dict[str, Callable[[nn.Module, Path, Any], None]] = {
        ".onnx": _export_onnx,
        ".pt2": _export_program,
    }
    if path.suffix not in writers:
        raise ExportError(f"'{path}' ends in '{path.suffix}'; name the format by the ending: {' or '.join(writers)}")
    net = (fold(student) if plan_of(student) is not None else deepcopy(student).eval()).to("cpu")
    example = tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, example)
    files.write(path, lambda part: writers[path.suffix](net, part, example))
    return path


def _batch(example: Any, size: int) -> Any:
    """``size`` images made from an example: its first one, repeated and scaled so that no two are equal."""

    def grow(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        t = torch.cat([t[:1]] * size)
        if t.is_floating_point():
            t = t * torch.linspace(0.5, 1.5, size, dtype=t.dtype).view([-1] + [1] * (t.dim() - 1))
        return t

    return tree_map(grow, example)


def _check(expected: Any, found: Any, path: Path, what: str) -> None:
    left = [t for t in tree_leaves(expected) if isinstance(t, Tensor)]
    right = [torch.as_tensor(t) for t in tree_leaves(found)]
    if [t.shape for t in left] != [t.shape for t in right]:
        raise ExportError(
            f"{what} returns shapes {[tuple(t.shape) for t in right]}, torch {[tuple(t.shape) for t in left]}"
        )
    for a, b in zip(left, right, strict=True):
        scale = max(float(a.abs().max()), 1e-6) if a.numel() else 1.0
        worst = float((a - b).abs().max()) / scale if a.numel() else 0.0
        if not worst <= _TOLERANCE:
            raise ExportError(
                f"{what} differs from torch by {worst:.1e} of the largest output (allowed {_TOLERANCE:.0e});"
                " nothing was written"
            )


def _export_onnx(net: nn.Module, path: Path, example: Any) -> None:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch's exporter needs
    except ImportError as error:
        raise ExportError(f"ONNX export needs '{error.name}'; pip install 'dyncompress[export]'") from None
    if not {"kwargs", "optimize"} <= signature(torch.onnx.export).parameters.keys():
        raise ExportError(
            f"torch {torch.__version__} has an earlier ONNX exporter than this is written for; upgrade to torch 2.6 or"
            " newer, or export to *.pt2"
        )
    args, kwargs = as_call(one_image(example))
    program = torch.onnx.export(net, args, kwargs=kwargs, dynamo=True, verbose=False, optimize=True)
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        _check(net(*args, **kwargs), session.run(None, feeds), path, "onnxruntime")


def _export_program(net: nn.Module, path: Path, example: Any) -> None:
    args, kwargs = as_call(_batch(example, 2))
    batch = torch.export.Dim("batch", max=1 << 16)  # torch 2.4 wants a bound
    shapes = tree_map(lambda t: {0: batch} if isinstance(t, Tensor) and t.dim() else None, (args, kwargs))
    with torch.no_grad():
        program = torch.export.export(net, args, kwargs, dynamic_shapes=(*shapes[0], *shapes[1].values()))
        archive = io.BytesIO()  # written to a full disk, torch's own archive ends the process
        torch.export.save(program, archive)
        path.write_bytes(archive.getbuffer())
        module = torch.export.load(path).module()
        for size in (1, 3, 8):
            more, named = as_call(_batch(example, size))
            _check(net(*more, **named), module(*more, **named), path, f"the exported program at batch {size}")
