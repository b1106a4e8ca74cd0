"""What came with a release newer than the oldest that dyncompress works with: its tests are skipped there."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import callbacks

EMAWeightAveraging: Any = getattr(callbacks, "EMAWeightAveraging", None)
averages = pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has weight averaging since 2.6")
