"""Small networks, one for each way in which channels travel or code counts them, beyond those of `networks`.

All take (B, 3, 16, 16) unless `EXAMPLES` says otherwise, at any batch size, in train and in eval mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import causes_attention
import causes_control
import causes_fields
import causes_folds
import causes_gates
import causes_norms
import causes_outputs
import causes_sharing
import causes_splits
import causes_weights

_FILES = (
    causes_splits, causes_folds, causes_gates, causes_weights, causes_norms, causes_attention, causes_sharing,
    causes_control, causes_outputs, causes_fields,
)  # fmt: skip
_TOO_NEW = (causes_folds.ShuffleModule,) if torch.__version__.startswith("2.4.") else ()  # has no derivative there
CAUSES: list[type[nn.Module]] = [cause for file in _FILES for cause in file.CAUSES if cause not in _TOO_NEW]
EXAMPLES: dict[type[nn.Module], Any] = {cause: example for file in _FILES for cause, example in file.EXAMPLES.items()}
READ_ACROSS: list[type[nn.Module]] = [cause for file in _FILES for cause in file.READ_ACROSS]
"""Something other than a weight reads across channels (a norm, a softmax, a mean): cutting is more than zeroing."""


def make(cause: type[nn.Module], seed: int = 0, batch: int = 2) -> tuple[nn.Module, Any]:
    """A network with lively BatchNorm statistics, in eval mode, and a batch for it as `trace` takes it."""
    torch.manual_seed(seed)
    net = cause().eval()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.track_running_stats:
                m.running_mean.normal_(0, 0.5)
                m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 2)
                nn.init.normal_(m.bias)
    example = EXAMPLES.get(cause, (3, 16, 16))
    return net, example(batch) if callable(example) else torch.randn(batch, *example)
