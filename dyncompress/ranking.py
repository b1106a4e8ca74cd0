"""Channels of every group ranked by the criterion that a person names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from dyncompress.errors import PlanError
from dyncompress.graph import ConvGraph, bare
from dyncompress.importance import IMPORTANCES, importance, norm_scales
from dyncompress.taylor import Loss, taylor


@dataclass(frozen=True)
class Ranking:
    """Channels of every group, scored.

    Attributes:
        name: By what: one of `IMPORTANCES`.
        scores: One array per group; the higher, the more a channel is worth.
    """

    name: str
    scores: list[np.ndarray]


def check(name: str, batches: object, loss: object = None) -> None:
    """Raise unless these arguments of `rank` go together."""
    if name not in IMPORTANCES:
        raise PlanError(f"importance {name!r} is unknown; choose one of {', '.join(IMPORTANCES)}")
    if name == "taylor" and batches is None:
        raise PlanError("importance 'taylor' needs data: pass batches=, a list of a few labelled batches")
    if name != "taylor" and (batches is not None or loss is not None):
        raise PlanError(f"importance {name!r} is of the weights alone; leave out batches and loss, or use 'taylor'")


def rank(
    net: nn.Module, graph: ConvGraph, name: str, batches: Iterable[Any] | None = None, loss: Loss | None = None
) -> Ranking:
    """Score every channel of every group.

    Args:
        net: The network that the graph was traced from.
        graph: Its channel graph.
        name: ``magnitude``, ``bn`` or ``taylor``.
        batches: For ``taylor``: a few batches.
        loss: For ``taylor``: of the network on a batch; cross-entropy on labelled batches by default.

    Returns:
        The scores.

    Raises:
        PlanError: If there is no such criterion, or it lacks what it needs.
    """
    check(name, batches, loss)
    net = bare(net)
    if name == "bn":
        return Ranking(name, norm_scales(net, graph))
    if name == "taylor":
        return Ranking(name, taylor(net, graph, batches or (), loss))
    return Ranking(name, importance(net, graph))
