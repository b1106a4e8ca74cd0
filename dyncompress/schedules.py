"""What layers do by the clock of a training: temperatures that fall, static starts that end, dynamics that set in.

A layer is told how much of the training is over (`DynamicConv.anneal`) and keeps what follows from it in a persistent
buffer: a checkpoint from the middle of a schedule computes what was trained, and a resumed run goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.layers import DynamicConv
from dyncompress.layers.annealing import remaining
from dyncompress.layers.options import check_part
from dyncompress.layers.router import RouterLinear

__all__ = ["ENDLESS", "anneal", "check_warmup", "hold", "progress"]

ENDLESS = 100_000  # steps that count as the whole of a training whose end is not known


def hold(net: nn.Module) -> None:
    """Have every dynamic layer start static: its coefficients do not depend on the input until `anneal` says so.

    What a layer's ``router`` makes of the input is scaled by a share that rises from 0, here, to 1, where the warm-up
    ends. A checkpoint holds it. Features that coefficients are predicted from are then those of a trained network.

    Args:
        net: A converted network, before it is trained. `fold` takes the share into the weights.

    Example:
        >>> hold(student)  # doctest: +SKIP
        >>> anneal(student, step / steps, warmup=0.2)  # doctest: +SKIP
    """
    for router in _routers(net):
        router.hold()


def anneal(net: nn.Module, progress: float, warmup: float = 0.0) -> None:
    """Tell every dynamic layer how much of the training is over. The callback does so before every batch.

    Args:
        net: A converted network. One without schedules is left as it is.
        progress: From 0, at the start, to 1.
        warmup: Part of the training until layers that `hold` made static are as dynamic as others; the share rises
            linearly, and never falls.

    Raises:
        DynCompressError: If either is no number from 0 to 1.

    Example:
        >>> anneal(student, step / steps)  # doctest: +SKIP
    """
    check_warmup(warmup)
    if isinstance(progress, bool) or not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise DynCompressError(
            f"progress {shown(progress)} is no part of a training; give steps done / steps in all, from 0 to 1"
        )
    for module in net.modules():
        if isinstance(module, DynamicConv):
            module.anneal(float(progress))
    for router in _routers(net):
        router.release(1 - remaining(progress, warmup))


def check_warmup(warmup: object) -> None:
    """Raise unless a value is a part of a training, in which layers become dynamic."""
    check_part("warmup", warmup, "a training", "0 (none) to 1, such as 0.2")


def _routers(net: nn.Module) -> Iterator[RouterLinear]:
    """What predicts the coefficients of each layer; those in front of it are hidden layers."""
    for module in net.modules():
        router = getattr(module, "router", None) if isinstance(module, DynamicConv) else None
        if isinstance(router, RouterLinear):
            yield router


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
