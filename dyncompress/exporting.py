"""Exports for deployment, each run again and compared with the student before it counts."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dyncompress import files
from dyncompress.conversion import plan_of
from dyncompress.errors import ExportError
from dyncompress.folding import fold
from dyncompress.formats import Writer, images_like, reopen, ways_to_write
from dyncompress.latency import Latency, measure_latency, run

log = logging.getLogger(__name__)

_SIZES = (1, 3, 8)  # batches that a file for any batch is checked at
_TOLERANCE = 1e-4  # largest difference between a file's outputs and the student's, as a share of the largest output


def export(
    student: nn.Module,
    path: str | Path,
    example: Any,
    *,
    batch: int | None = None,
    compiled: bool = False,
    original: nn.Module | None = None,
) -> Path:
    """Write a student for deployment, BatchNorm folded, and check the file against it before it counts.

    The file is loaded again and run at batch 1, 3 and 8 on images that all differ. What it returns is compared with
    the student as it was given, in eval mode: largest difference / largest output <= 1e-4.

    Args:
        student: A converted network, or any other.
        path: ``*.onnx`` for onnxruntime, ``*.pt2`` for `torch.export`.
        example: What its ``forward`` takes; the leading dimension of its tensors is the batch.
        batch: The only batch size that the file takes; None for any. For networks whose code fixes one, and for
            runtimes that know no loops.
        compiled: Compile a ``*.pt2`` ahead of time for this machine's kind of CPU (AOTInductor).
        original: The original network. Where it is given it is exported, too, and timed beside the student; the ratio
            is logged, as a warning where the student is not faster.

    Returns:
        The path. Nothing is left there when the check fails.

    Raises:
        ExportError: If an argument is unknown, a package or compiler is missing, the network can't be exported or
            doesn't run at these batch sizes, or the file's outputs differ.
        WriteError: If the file can't be written.

    Example:
        >>> from dyncompress import convert, make_plan
        >>> net, images = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)), torch.zeros(2, 3, 8, 8)
        >>> student = convert(net, make_plan(net, images, "50%"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     reopen(export(student, Path(folder, "student.pt2"), images))(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 8, 4, 4])
    """
    path = Path(path)
    ways = ways_to_write(student, path, batch, compiled)
    example = tree_map(lambda t: t.detach().cpu() if isinstance(t, Tensor) else t, example)
    expected = _expected(deepcopy(student).eval().to("cpu"), example, _SIZES if batch is None else (batch,))
    net = (fold(student) if plan_of(student) is not None else deepcopy(student).eval()).to("cpu")
    # Kernels may lie in memory in another order than their dimensions, of which torch.export.save warns.
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    files.write(path, lambda part: _write_checked(net, part, example, batch, ways, expected))
    if original is not None:
        with tempfile.TemporaryDirectory() as folder:
            other = export(original, Path(folder) / f"original{path.suffix}", example, batch=batch, compiled=compiled)
            size = batch or 1
            times = export_times({"original": other, "student": path}, example, batch_sizes=(size,))
        _tell(times["original"][size], times["student"][size], path, size)
    return path


def export_times(
    exported: Mapping[str, Path],
    example: Any,
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: int = 1,
    rounds: int = 20,
    budget_s: float = 5.0,
) -> dict[str, dict[int, Latency]]:
    """Time exported files against each other, as `measure_latency` times networks.

    Args:
        exported: Files by name; the first is what the others are compared with.
        example: One batch of their inputs.
        batch_sizes: Batch sizes to measure.
        threads: Threads of the runtime.
        rounds: Rounds A B ... B A per batch size, at least 5.
        budget_s: Seconds per batch size after which no further round starts.

    Returns:
        ``{name: {batch_size: Latency}}``.
    """
    nets = {name: reopen(path, threads) for name, path in exported.items()}
    return measure_latency(nets, example, batch_sizes=batch_sizes, rounds=rounds, threads=threads, budget_s=budget_s)


def _tell(original: Latency, student: Latency, path: Path, size: int) -> None:
    line = f"'{path}' takes {student.ratio:.2f}x the original's time at batch {size}, one thread"
    line += f" ({student.median_ms:.2f} against {original.median_ms:.2f} ms)"
    if student.ratio < 1:
        log.info(line)
    else:
        log.warning(f"{line}: fewer MACs, no less time; make fewer layers dynamic (static=...), or ask for less")


# ---- checks ------------------------------------------------------------------------------------------------------


def _write_checked(
    net: nn.Module, path: Path, example: Any, batch: int | None, ways: list[Writer], expected: Mapping[int, Any]
) -> None:
    failures = []
    for write in ways:
        try:
            write(net, path, example, batch)
            return _verify(reopen(path), expected, example)
        except ExportError as error:
            failures.append(error)
    raise failures[0]


def _expected(student: nn.Module, example: Any, sizes: Sequence[int]) -> dict[int, Any]:
    """What the student returns, by batch size."""
    outputs, failures = {}, {}
    with torch.no_grad():
        for size in sizes:
            try:
                outputs[size] = run(student, images_like(example, size))
            except Exception as error:  # noqa: BLE001 - whatever the network's own code raises; told below
                failures[size] = error
    if failures:
        first = next(iter(failures.values()))
        raise ExportError(
            f"{type(student).__name__} doesn't run at batch {', '.join(map(str, failures))} ({files.reason(first)}); a"
            " file takes any batch size, or the one that you name: pass batch=1, or the size that its code fixes"
        ) from first
    return outputs


def _verify(exported: nn.Module, expected: Mapping[int, Any], example: Any) -> None:
    for size, wanted in expected.items():
        try:
            with torch.no_grad():
                found = run(exported, images_like(example, size))
        except Exception as error:  # whatever a runtime raises; chained
            raise ExportError(
                f"the file doesn't run at batch {size} ({files.reason(error)}); nothing was written. The network's code"
                " fixes the batch, or mixes the images of one: pass batch=1, or the size that you need"
            ) from error
        _compare(wanted, found, f"the file at batch {size}")


def _compare(expected: Any, found: Any, what: str) -> None:
    left = [t for t in tree_leaves(expected) if isinstance(t, Tensor)]
    right = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
    if [t.shape for t in left] != [t.shape for t in right]:
        raise ExportError(
            f"{what} returns shapes {[tuple(t.shape) for t in right]}, the student {[tuple(t.shape) for t in left]};"
            " nothing was written"
        )
    for a, b in zip(left, right, strict=True):
        scale = max(float(a.abs().max()), 1e-6) if a.numel() else 1.0
        worst = float((a - b).abs().max()) / scale if a.numel() else 0.0
        if not worst <= _TOLERANCE:
            raise ExportError(
                f"{what} differs from the student by {worst:.1e} of the largest output (allowed {_TOLERANCE:.0e});"
                " nothing was written"
            )
