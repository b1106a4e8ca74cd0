"""Where measured numbers come from: machine, versions, command; a number without these is an anecdote."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dyncompress import __version__, allocator

SECRET = re.compile(r"(?i)^(-*[\w.-]*(?:key|token|secret|password)[\w-]*)(=|$)")


@dataclass(frozen=True)
class Environment:
    """The process that made a report.

    Attributes:
        date: UTC, ISO 8601.
        command: The command line; values of options that look like secrets are left out.
        hardware: Processor, and the GPU when one was in use.
        threads: Threads of torch.
        allocator: Settings of the memory allocator: they move latencies at large batches by factors.
        versions: Version by package.
    """

    date: str
    command: str
    hardware: str
    threads: int
    allocator: str
    versions: Mapping[str, str]

    @classmethod
    def here(cls, command: Sequence[str] | None = None) -> Environment:
        """This process, now.

        Args:
            command: The command line, word by word; default: ``sys.argv``.
        """
        return cls(
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=_without_secrets(sys.argv if command is None else command),
            hardware=_hardware(),
            threads=torch.get_num_threads(),
            allocator=_allocator(),
            versions=_versions(),
        )

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"{self.hardware}, {threads}; {packages}; {self.date}"


def _hardware() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(models, "") or platform.processor() or platform.machine()
    # Asking for the name would start CUDA; if it has not started, nothing ran there.
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_initialized() else name


def _allocator() -> str:
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    if preloaded := os.environ.get("LD_PRELOAD"):
        settings.append(f"LD_PRELOAD={Path(preloaded).name}")
    if allocator.freed_memory_is_kept:
        settings.append("freed memory kept")
    return " ".join(settings) or "default"


def _versions() -> dict[str, str]:
    found = {"dyncompress": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("lightning", "pytorch-lightning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # either name of Lightning will do
    return found


def _without_secrets(words: Sequence[str]) -> str:
    """The command line without the values of options such as --api_key=... or --token ..."""
    shown: list[str] = []
    hide_next = False
    for word in words:
        secret = SECRET.match(word)
        if hide_next:
            shown.append("***")
        else:
            shown.append(f"{secret[1]}=***" if secret and secret[2] else word)
        hide_next = bool(secret and not secret[2] and word.startswith("-"))
    return shlex.join(shown)
