"""What came with a release newer than the oldest that dyncompress works with: its tests are skipped there."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks

EMAWeightAveraging: Any = getattr(callbacks, "EMAWeightAveraging", None)
averages = pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has weight averaging since 2.6")
writes_onnx = pytest.mark.skipif(
    "optimize" not in signature(torch.onnx.export).parameters, reason="torch has this ONNX exporter since 2.6"
)
