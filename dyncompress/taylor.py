"""What the loss would say to a channel's removal, to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncompress.errors import PlanError
from dyncompress.evaluation import labelled, logits_of
from dyncompress.graph import ConvGraph, bare, duplicate
from dyncompress.importance import per_channel, weights
from dyncompress.latency import device_of, move, run

Loss = Callable[[nn.Module, Any], Tensor]
"""Loss of a network on one batch, as the loader yields it: a scalar tensor with a gradient."""


def cross_entropy(net: nn.Module, batch: Any) -> Tensor:
    """The default loss: of a classifier's logits, on batches as `dyncompress.evaluate` takes them."""
    inputs, labels = labelled(batch)
    return F.cross_entropy(logits_of(run(net, inputs)), labels)


def taylor(net: nn.Module, graph: ConvGraph, batches: Iterable[Any], loss: Loss | None = None) -> list[np.ndarray]:
    """|weight x gradient| of everything that reads a channel, averaged over batches.

    To cut a channel is to set the weights that read it to zero. To first order that changes the loss by::

        score[c] = |sum over the weights w that read c of w * dL/dw| = |sum over positions of a[c] * dL/da[c]|

    where ``a[c]`` is the channel's activation. The network is in eval mode: the student's BatchNorms start from the
    same statistics. A group's scores are divided by their mean (:mod:`dyncompress.importance` says why).

    Args:
        net: The network that the graph was traced from; left as it was.
        graph: Its channel graph.
        batches: A few batches; each is moved to the network's device.
        loss: Of the network on a batch; cross-entropy of logits and labels by default.

    Returns:
        One array per group, mean 1 (0 where the loss does not see the group).

    Raises:
        PlanError: If there is no batch, or the loss has no gradient or isn't finite.

    Source:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, equation 8 (weights that write
        a channel, squared). Differs: weights that read it, which is exact to first order where nothing else reads it.
    """
    copy = duplicate(bare(net)).eval().requires_grad_(True)
    place, loss = device_of(copy), loss or cross_entropy
    transposed = {op.weight for op in graph.operations if op.kind == "conv_transpose"}
    axes = [(dim, runs, t) for name, dim, runs, t in weights(copy, graph) if t.dim() > 1 and t.requires_grad
            and dim == (0 if name in transposed else 1)]  # fmt: skip
    totals = [np.zeros(g.channels) for g in graph.groups]
    count = 0
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        for count, batch in enumerate(batches, 1):
            copy.zero_grad(set_to_none=True)
            value = loss(copy, move(batch, place))
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise PlanError(f"the loss gives {value!r}; importance 'taylor' needs a scalar tensor with a gradient")
            if not torch.isfinite(value):
                raise PlanError(f"the loss is {value.item()} on batch {count}; importance 'taylor' needs a finite one")
            value.backward()
            changes = [np.zeros(g.channels) for g in graph.groups]
            for dim, runs, tensor in axes:
                if tensor.grad is None:
                    continue
                product = (tensor.detach() * tensor.grad).double().movedim(dim, 0).flatten(1).sum(1)
                for group, sums in per_channel(graph, runs, product.cpu().numpy()).items():
                    changes[group] += sums
            for total, change in zip(totals, changes, strict=True):
                total += np.abs(change)
    if not count:
        raise PlanError("importance 'taylor' needs batches, and got none; give a loader, or a list of a few batches")
    return [total / max(total.mean(), np.finfo(float).tiny) for total in totals]
