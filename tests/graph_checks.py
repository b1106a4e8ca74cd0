"""What a channel graph, and a network cut by it, must pass. A check asserts, and says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dyncompress.conversion import convert, narrowed
from dyncompress.cost import CostModel, measure_macs, static_choices, widths
from dyncompress.graph import ConvGraph, as_call, duplicate, tensors_in
from dyncompress.layers import Static
from dyncompress.narrowing import cut, positions
from dyncompress.plan import Plan

Kept = list[list[int]]


def run(net: nn.Module, example: Any) -> list[Tensor]:
    """The tensors that come out."""
    args, kwargs = as_call(example)
    return tensors_in(net(*args, **kwargs))


def outputs(net: nn.Module, example: Any) -> Tensor:
    """All that comes out in eval mode, in one row."""
    with torch.no_grad():
        return torch.cat([t.flatten() for t in run(net.eval(), example) if t.is_floating_point()])


def doubled(net: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """A copy of the network, and the example, in double precision."""
    wide = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example)
    return nn.Module.double(duplicate(net)), wide


def thirds(graph: ConvGraph) -> Kept:
    """Every third channel of every group goes."""
    return [[i for i in range(g.channels) if i % 3 != 1] for g in graph.groups]


@contextmanager
def left_as_it_was(net: nn.Module) -> Iterator[None]:
    """Values, identities, modes and hooks are after the block what they were before it."""

    def look() -> Any:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
        tensors = [*net.parameters(), *net.buffers()]
        return [id(t) for t in tensors], [t.requires_grad for t in tensors], [m.training for m in net.modules()], hooks

    seen = look()
    values = {name: value.clone() for name, value in net.state_dict().items()}
    yield
    assert look() == seen
    assert all(torch.equal(values[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def runs_and_learns(net: nn.Module, original: nn.Module, example: Any) -> None:
    """The same shapes come out in both modes, and in training mode a gradient reaches what it reached before."""
    for training in (False, True):
        expected = [(t.shape, t.dtype) for t in run(duplicate(original).train(training), example)]
        found = run(duplicate(net).train(training), example)
        assert [(t.shape, t.dtype) for t in found] == expected
        assert all(t.isfinite().all() for t in found if t.is_floating_point())
    reached = _reached(original, example)
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert reached & names <= _reached(net, example)


def _reached(net: nn.Module, example: Any) -> set[str]:
    copy = duplicate(net).train()
    sum(t.square().sum() for t in run(copy, example) if t.requires_grad).backward()
    return {name for name, p in copy.named_parameters() if p.grad is not None}


def smaller_and_runs(net: nn.Module, graph: ConvGraph, example: Any) -> None:
    """Cut by every third channel, the network is smaller, runs and learns."""
    small = duplicate(net)
    cut(small, graph, thirds(graph))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    runs_and_learns(small, net, example)


def every_width_is_explained(graph: ConvGraph) -> None:
    """A layer of several output channels, none of which can be cut, says why."""
    for op in graph.operations:
        dim = 1 if op.kind == "conv_transpose" else 0
        layer = op.weight == f"{op.module}.weight" and graph.parameters[op.weight][dim] > 1
        assert op.reason or not layer or f"{op.weight}:{dim}" in graph.axes, f"{op.module} doesn't say why it stays"


def counts_what_runs(net: nn.Module, graph: ConvGraph, example: Any) -> None:
    """At full width the cost model counts the multiply-adds that torch counts."""
    model = CostModel(graph, static_choices(graph, Static()))
    assert model.macs(widths(graph)) == measure_macs(net, example)


def equals_zeroed(net: nn.Module, graph: ConvGraph, example: Any, read: Mapping[str, Sequence[int]]) -> None:
    """Cut, it computes what the original does when no weight reads the channels: the index maps are right.

    Args:
        net: The network, in which channels are read by weights alone.
        graph: Its channel graph.
        example: Its input.
        read: Parameters that aren't the weight of an operation, or are read along other dimensions than it.
    """
    net, example = doubled(net, example)
    kept = thirds(graph)
    small, zeroed = duplicate(net), duplicate(net)
    cut(small, graph, kept)
    state = {**dict(zeroed.named_parameters()), **dict(zeroed.named_buffers())}
    readers = {op.weight: (0 if op.kind == "conv_transpose" else 1,) for op in graph.operations if op.weight}
    with torch.no_grad():
        for name, dim in ((name, dim) for name, dims in {**readers, **read}.items() for dim in dims):
            runs = graph.axes.get(f"{name}:{dim}")
            if runs is not None:
                weight = state[name]
                gone = sorted(set(range(weight.shape[dim])) - set(positions(runs, kept)))
                weight.index_fill_(dim, torch.tensor(gone, dtype=torch.int64), 0)
    found, expected = outputs(small, example), outputs(zeroed, example)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-6 * scale
    assert (outputs(net, example) - expected).abs().max() > 1e-3 * scale, "the zeroed channels mattered"


def lands(plan: Plan, share: float) -> None:
    """Within 1 % below its share of the MACs, or the next channel of any group would be over it."""
    target, full = share * plan.macs_before, [group.channels for group in plan.graph.groups]
    assert plan.macs_after <= target
    for g, width in enumerate(full):
        more = [w + (i == g) for i, w in enumerate(plan.widths)]
        assert plan.ratio >= 0.99 * share or plan.widths[g] == width or plan.costs.macs(more) > target


def carries_out(net: nn.Module, plan: Plan, example: Any) -> None:
    """The student starts as the narrowed network, learns, and comes back from its state dict."""
    with left_as_it_was(net):
        student, reference = convert(net, plan), narrowed(net, plan)
        other = convert(net, plan, seed=1)
    expected = outputs(reference, example)
    scale = expected.abs().max().clamp_min(1)
    assert (outputs(student, example) - expected).abs().max() < 1e-4 * scale
    runs_and_learns(student, net, example)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(student.state_dict())
    assert (outputs(other, example) - outputs(student, example)).abs().max() < 1e-6 * scale
