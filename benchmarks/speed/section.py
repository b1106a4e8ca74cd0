"""One section of the benchmark, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import peers
from benchmarks.speed.request import Request
from benchmarks.speed.rows import Section, write
from dyncompress.allocator import keep_freed_memory
from dyncompress.provenance import Environment

SECTIONS = ("networks", "training", "layers", "pruning", "planning", "distillation", "deployment")
ON_CPU_ONLY = ("planning", "deployment")
_MORE_VERSIONS = ("timm", "torch-pruning", "onnxruntime")


def name_of(section: str, device: str) -> str:
    """Of the files that hold its results."""
    return section if device == "cpu" else f"{section}-{device}"


def measure(
    report: Callable[[dict[str, Any]], None], section: str, request: Request, command: list[str], keep: bool, out: Path
) -> None:
    """Measure a section and write it.

    Args:
        report: Takes the number of rows, as they come.
        section: One of `SECTIONS`.
        request: How to measure.
        command: What was typed.
        keep: Whether freed memory stays in the process, as `dyncompress run` has it.
        out: Folder of the results.
    """
    if keep:
        keep_freed_memory()
    torch.set_num_threads(request.threads)
    rows = []
    for row in import_module(f"benchmarks.speed.{section}").measure(request):
        rows.append(row)
        report({"rows": len(rows)})
    provenance = _provenance(section, request, command)
    write(out, Section(name_of(section, request.device), tuple(rows), provenance))


def _provenance(section: str, request: Request, command: list[str]) -> dict[str, Any]:
    environment = asdict(Environment.here(command))
    for package in _MORE_VERSIONS:
        try:
            environment["versions"][package] = version(package)
        except PackageNotFoundError:
            continue  # the section did without it
    if section == "layers":
        environment["versions"] |= peers.commits(request)
    return {**environment, "seed": request.seed, "rounds": request.rounds, "seconds": request.seconds}
