"""Importing is free: nothing heavy, nothing optional, no CUDA context."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HOSTS = {"lightning", "pytorch_lightning", "wandb"}
HEAVY = {"torch", "matplotlib", "onnx", "onnxscript", "onnxruntime", "torchvision", "sklearn", "pyarrow"}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after the statement."""
    code = f"{statement}; import json, sys; print(json.dumps([n for n in sys.modules if '.' not in n]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_the_scan_sees_what_is_loaded() -> None:
    assert "rich" in loaded_by("import rich")


def test_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import dyncompress") & (HOSTS | HEAVY)


@pytest.mark.parametrize("name", ["make_plan", "convert", "DistillConfig", "Report", "save"])
def test_core_loads_no_trainer_and_no_logger(name: str) -> None:
    assert not loaded_by(f"from dyncompress import {name}") & HOSTS


def test_core_starts_no_cuda() -> None:
    loaded_by("from dyncompress import make_plan; import torch; assert not torch.cuda.is_initialized()")
