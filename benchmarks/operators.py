"""Declares the two operators that torchvision's wheel looks for at import and a CPU-only torch lacks.

Import it before anything that imports torchvision. No network of the zoo calls them.
"""

from __future__ import annotations

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # undone when it is collected, so it stays in the module

for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _LIBRARY.define(_name + _BOXES)
