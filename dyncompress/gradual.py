"""Narrowing in steps: a network is cut a little, trained, cut a little more, and only at last to what its plan says.

Between two steps the narrowed network is put back into the shapes of the original: what was trained goes to its places,
and what read the channels that are gone is zero. That network computes what the narrowed one does, and every step is an
ordinary plan of the original's, the last one with the widths and methods that were asked for.

Which channels go next is decided anew at every step, by magnitude of the weights as they are then, among those that
are left; channels that the plan names stay to the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyncompress.compensation import evaluating
from dyncompress.cost import static_choices
from dyncompress.errors import PlanError
from dyncompress.graph import as_call, bare, duplicate, tensors_in
from dyncompress.importance import best, importance
from dyncompress.layers import Static
from dyncompress.narrowing import positions
from dyncompress.plan import Plan

Channels = tuple[tuple[int, ...], ...]
"""Channels of every width group that a network still has."""


def lengths(epochs: int, steps: int) -> list[int]:
    """Epochs of every step; what doesn't divide goes to the last.

    Example:
        >>> lengths(12, 3), lengths(5, 2)
        ([4, 4, 4], [2, 3])
    """
    each = epochs // steps
    return [each] * (steps - 1) + [epochs - each * (steps - 1)]


def everything(plan: Plan) -> Channels:
    """All channels of the original."""
    return tuple(tuple(range(group.channels)) for group in plan.graph.groups)


def next_plan(net: nn.Module, plan: Plan, left: Channels, part: float) -> Plan:
    """The plan of a step: a static network of ``channels * (kept / channels) ** part`` channels per group.

    Args:
        net: The network, in the original's shapes.
        plan: Where it is to end.
        left: Channels that it still has.
        part: How much of the way this step ends at; 1 for all of it, which gives ``plan`` itself, its channels named.
    """
    graph, keep = plan.graph, []
    for group, score, last, stay in zip(graph.groups, importance(net, graph), plan.keep, left, strict=True):
        least = last if isinstance(last, int) else len(last)
        order = np.full(group.channels, -np.inf)
        order[list(stay)] = score[list(stay)]
        if not isinstance(last, int):
            order[list(last)] = np.inf
        keep.append(best(order, max(least, round(group.channels * (least / group.channels) ** part))))
    if part == 1:
        return dataclasses.replace(plan, keep=tuple(keep))
    step = Plan(graph, tuple(keep), tuple(static_choices(graph, Static())), "static", {}, "100%", plan.allocation)
    return dataclasses.replace(step, target=f"{step.ratio:.2%}")


def put_back(narrow: nn.Module, original: nn.Module, plan: Plan, example: Any) -> nn.Module:
    """A narrowed static network in the original's shapes: it computes the same.

    Args:
        narrow: The network, trained.
        original: What it was cut from; left as it is. Channels that are gone are written by its weights, and not read.
        plan: By which it was cut, channels named.
        example: What ``forward`` takes, to see that it is so.

    Raises:
        PlanError: If it computes something else: a layer depends on how many channels there are.
    """
    left = channels_of(plan)
    net = duplicate(bare(original))
    found = {**dict(narrow.named_parameters()), **dict(narrow.named_buffers())}
    transposed = {op.weight for op in plan.graph.operations if op.kind == "conv_transpose"}
    with torch.no_grad():
        for name, tensor in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
            if name not in found:
                continue
            stay = {dim: positions(runs, left) for dim in range(tensor.dim())
                    if (runs := plan.graph.axes.get(f"{name}:{dim}")) is not None}  # fmt: skip
            reads = 0 if name in transposed else 1
            if tensor.dim() > 1 and reads in stay:
                gone = sorted(set(range(tensor.shape[reads])) - set(stay[reads]))
                tensor.index_fill_(reads, torch.tensor(gone, dtype=torch.int64, device=tensor.device), 0)
            _fill(tensor, stay, found[name])
    _check(net, narrow, example)
    return net


def channels_of(plan: Plan) -> Channels:
    """The channels that a plan keeps.

    Raises:
        PlanError: If it gives only their number.
    """
    if any(isinstance(k, int) for k in plan.keep):
        raise PlanError("the plan gives the number of channels only; take the one that the converted network carries")
    return tuple(k for k in plan.keep if not isinstance(k, int))


def _fill(tensor: Tensor, stay: dict[int, list[int]], values: Tensor) -> None:
    """Put values at the crossings of the positions that stay; a scalar as it is."""
    if not tensor.dim():
        tensor.copy_(values)
        return
    index = []
    for dim, size in enumerate(tensor.shape):
        at = torch.tensor(stay.get(dim, list(range(size))), dtype=torch.int64, device=tensor.device)
        index.append(at.view([-1 if d == dim else 1 for d in range(tensor.dim())]))
    tensor[tuple(index)] = values.to(tensor)


def _check(net: nn.Module, narrow: nn.Module, example: Any) -> None:
    results: list[Sequence[Tensor]] = []
    for one in (net, narrow):
        args, kwargs = as_call(example)
        with evaluating(one), torch.no_grad(), torch.random.fork_rng(devices=[]):
            results.append([t.double() for t in tensors_in(one(*args, **kwargs)) if t.is_floating_point()])
    for wide, cut in zip(*results, strict=True):
        if wide.shape != cut.shape or (wide - cut).norm() > 1e-3 * cut.norm() + 1e-6:
            raise PlanError(
                "the network can't be narrowed in steps: with the channels that are gone at zero it computes something"
                " else than without them, so that a layer depends on their number (a norm over channels, say); narrow"
                " it at once, with narrowing_steps: 1"
            )
