"""What came with a release newer than the oldest that dyncompress works with: its tests are skipped there."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, callbacks

EMAWeightAveraging: Any = getattr(callbacks, "EMAWeightAveraging", None)
averages = pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has weight averaging since 2.6")
exits = pytest.mark.skipif(
    "weights_only" not in signature(LightningModule.load_from_checkpoint).parameters,
    reason="Lightning makes an exit of Ctrl-C since some release after 2.2, which went on as if training were over",
)
writes_onnx = pytest.mark.skipif(
    "optimize" not in signature(torch.onnx.export).parameters, reason="torch has this ONNX exporter since 2.6"
)
compiles = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="torch packages compiled programs like this since 2.6",
)
