"""Which channels matter: a score per channel of every width group.

=============  =====================================================================================================
``magnitude``  norms of the weights that write, scale and read a channel
``bn``         |gamma| of the BatchNorms that scale it
``taylor``     |weight x gradient| of what reads it, on a few batches (:mod:`dyncompress.taylor`)
=============  =====================================================================================================

Scores of different groups are compared with one threshold, so they need one unit. A group's norms and gammas have
none: doubling a layer's weights and halving the next one's changes nothing. They are divided by the group's mean.
Taylor scores are all in units of the loss, but a first-order estimate is of small changes: with one threshold on them
CIFAR-10 ResNet-20 at 25 % of the MACs kept 8 of 64 channels in late layers, and had 78.9 % where equal widths had 83.1
(docs/allocation.md). So they are divided by the group's mean, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dyncompress.errors import PlanError
from dyncompress.graph import ConvGraph
from dyncompress.narrowing import Runs

IMPORTANCES = ("magnitude", "bn", "taylor")


def importance(net: nn.Module, graph: ConvGraph) -> list[np.ndarray]:
    """Magnitude of every channel, over everything that writes, normalises or reads it.

    ``score[c] = mean over axes of (norm of the tensor's slice at c / mean norm of the axis)``, norms in L2. Biases
    and running statistics are left out: they shift a channel, they don't say what it is worth.

    Args:
        net: The network that the graph was traced from.
        graph: Its channel graph.

    Returns:
        One array per group, mean about 1 over the group.
    """
    totals = [np.zeros(g.channels) for g in graph.groups]
    counts = [0] * len(graph.groups)
    for name, dim, runs, tensor in weights(net, graph):
        if name.endswith("bias"):
            continue
        wide = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))
        others = [d for d in range(tensor.dim()) if d != dim]
        norms = torch.linalg.vector_norm(wide, dim=others) if others else wide.abs()  # reads large weights once
        for group, sums in per_channel(graph, runs, norms.double().square().numpy()).items():
            totals[group] += _scaled(np.sqrt(sums))
            counts[group] += 1
    return [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]


def norm_scales(net: nn.Module, graph: ConvGraph) -> list[np.ndarray]:
    """|gamma| of the BatchNorms that a group's channels pass, each divided by its mean over the group.

    A group that passes none (in a network that has some) is scored by `importance`: its mean is 1 as well.

    Args:
        net: The network that the graph was traced from.
        graph: Its channel graph.

    Returns:
        One array per group.

    Raises:
        PlanError: If no group passes a BatchNorm with scales.

    Source:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, section 3. Differs:
        gammas of a group are relative to their mean, since networks are rarely trained with a penalty on them.
    """
    norms = {f"{name}.weight" for name, m in net.named_modules() if hasattr(m, "running_var") and hasattr(m, "weight")}
    totals = [np.zeros(g.channels) for g in graph.groups]
    counts = [0] * len(graph.groups)
    for name, _, runs, tensor in weights(net, graph):
        if name in norms and tensor.dim() == 1:
            gammas = tensor.detach().to("cpu", torch.float64).abs().numpy()
            for group, sums in per_channel(graph, runs, gammas).items():
                totals[group] += _scaled(sums)
                counts[group] += 1
    if not any(counts):
        raise PlanError(
            "importance 'bn' ranks channels by their BatchNorm's scales, and no channels that can be cut pass a"
            " BatchNorm with scales; use 'magnitude' or 'taylor'"
        )
    spare = importance(net, graph) if not all(counts) else totals
    return [t / n if n else s for t, n, s in zip(totals, counts, spare, strict=True)]


def weights(net: nn.Module, graph: ConvGraph) -> Iterator[tuple[str, int, Runs, Tensor]]:
    """Name, dimension, runs and tensor of every parameter axis that channels of a group pass."""
    tensors = {**dict(net.named_buffers()), **dict(net.named_parameters())}
    parameters = {name.rpartition(".")[0] for name in graph.parameters}
    for key, runs in graph.axes.items():
        name, dim = key.rsplit(":", 1)
        module, _, kind = name.rpartition(".")
        frozen = kind == "weight" and module not in parameters  # a BatchNorm that keeps its scales in buffers
        if name in tensors and (name in graph.parameters or frozen):
            yield name, int(dim), runs, tensors[name]


def per_channel(graph: ConvGraph, runs: Runs, values: np.ndarray) -> dict[int, np.ndarray]:
    """Values along an axis, summed per channel of each group on it."""
    sums: dict[int, np.ndarray] = {}
    at = 0
    for group, start, count, repeat in runs:
        if group >= 0:
            found = sums.setdefault(group, np.zeros(graph.groups[group].channels))
            found[start : start + count] += values[at : at + count * repeat].reshape(count, repeat).sum(1)
        at += count * repeat
    return sums


def best(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """The ``count`` channels of highest score, ascending; of equal scores the first."""
    order = np.argsort(-scores, kind="stable")
    return tuple(sorted(int(i) for i in order[:count]))


def _scaled(values: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = values / max(values.mean(), np.finfo(float).tiny)
    return scaled
