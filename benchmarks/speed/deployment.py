"""Exported to ONNX and run by onnxruntime on the CPU: a student against its original, and against torch's numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

import dyncompress as dc
from benchmarks.speed.request import Request
from benchmarks.speed.rows import Row
from benchmarks.speed.subjects import Subject, as_converted

EXACT_AT = (1, 3, 8)


def measure(request: Request) -> Iterator[Row]:
    """Time at batch 1, and how far the outputs are from torch's at the batch sizes that the files take."""
    for subject in Subject.all(request.seed):
        nets = {
            "original": as_converted(subject.original, subject.image),
            "static": as_converted(subject.static, subject.image),
            "dynamic": subject.dynamic,
        }
        sessions = {arm: session(net, subject, request.threads) for arm, net in nets.items()}
        x = subject.batch(1).numpy()
        race = request.effort.race({arm: partial(_run, made, x) for arm, made in sessions.items()})
        yield from race.rows(
            ["static", "dynamic"], macs=subject.macs(nets), subject=subject.name, setting="onnxruntime", batch=1
        )
        for size in filter(partial(_takes, sessions["dynamic"]), EXACT_AT):
            images = subject.batch(size)
            with torch.inference_mode():
                expected = dc.fold(subject.dynamic)(images).numpy()
            error = float(np.abs(_run(sessions["dynamic"], images.numpy()) - expected).max() / np.abs(expected).max())
            yield Row(subject.name, "onnxruntime", size, "dynamic", "torch", error=error)


def session(net: nn.Module, subject: Subject, threads: int) -> onnxruntime.InferenceSession:
    """A converted network, exported and loaded."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = dc.export(net, Path(folder) / "net.onnx", subject.image)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(made: onnxruntime.InferenceSession, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return made.run(None, {made.get_inputs()[0].name: x})[0]  # type: ignore[no-any-return]


def _takes(made: onnxruntime.InferenceSession, size: int) -> bool:
    fixed = made.get_inputs()[0].shape[0]
    return not isinstance(fixed, int) or fixed == size
