"""Which channels matter: a score per channel of every width group, from the weights alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dyncompress.graph import ConvGraph


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
    tensors = dict(net.named_parameters())
    for key, runs in graph.axes.items():
        name, dim = key.rsplit(":", 1)
        tensor = tensors.get(name)
        if tensor is None or name.endswith("bias"):
            continue
        rows = tensor.detach().to("cpu", torch.float64).movedim(int(dim), 0).flatten(1) if tensor.dim() > 1 else (
            tensor.detach().to("cpu", torch.float64).unsqueeze(1)
        )  # fmt: skip
        norms = rows.square().sum(1).numpy()
        at, seen = 0, set()
        sums = {group: np.zeros(graph.groups[group].channels) for group, *_ in runs if group >= 0}
        for group, start, count, repeat in runs:
            if group >= 0:
                sums[group][start : start + count] += norms[at : at + count * repeat].reshape(count, repeat).sum(1)
                seen.add(group)
            at += count * repeat
        for group in seen:
            length = np.sqrt(sums[group])
            totals[group] += length / max(length.mean(), np.finfo(float).tiny)
            counts[group] += 1
    return [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]


def best(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """The ``count`` channels of highest score, ascending; of equal scores the first."""
    order = np.argsort(-scores, kind="stable")
    return tuple(sorted(int(i) for i in order[:count]))
