"""What layers do by the clock of a training: temperatures that fall, static starts that end.

A layer is told how much of the training is over (`DynamicConv.anneal`) and keeps what follows from it in a persistent
buffer: a checkpoint from the middle of a schedule computes what was trained, and a resumed run goes on from there.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.layers import DynamicConv

__all__ = ["ENDLESS", "anneal", "progress"]

ENDLESS = 100_000  # steps that count as the whole of a training whose end is not known


def anneal(net: nn.Module, progress: float) -> None:
    """Tell every dynamic layer how much of the training is over. The callback does so before every batch.

    Args:
        net: A converted network. One without schedules is left as it is.
        progress: From 0, at the start, to 1.

    Raises:
        DynCompressError: If it is no number from 0 to 1.

    Example:
        >>> anneal(student, step / steps)  # doctest: +SKIP
    """
    if isinstance(progress, bool) or not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise DynCompressError(
            f"progress {shown(progress)} is no part of a training; give steps done / steps in all, from 0 to 1"
        )
    for module in net.modules():
        if isinstance(module, DynamicConv):
            module.anneal(float(progress))


def progress(trainer: Any) -> float:
    """The part of a Trainer's training that is over, from 0 to 1.

    Optimizer steps done over those expected; where the data have no length, epochs; where no end is known (neither
    ``max_steps`` nor ``max_epochs``), steps over 100,000.

    Args:
        trainer: A Lightning Trainer that fits.
    """
    expected = float(trainer.estimated_stepping_batches)  # infinite or -1 where it is not known
    if math.isfinite(expected) and expected > 0:
        return min(1.0, int(trainer.global_step) / expected)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        return min(1.0, int(trainer.current_epoch) / int(trainer.max_epochs))
    return min(1.0, int(trainer.global_step) / ENDLESS)
