"""Every network of `causes`: traced, cut, planned, converted."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import causes
import graph_checks
from dyncompress.errors import BudgetError
from dyncompress.graph import ConvGraph
from dyncompress.layers import get_method
from dyncompress.plan import Plan
from dyncompress.planning import Problem, make_plan
from dyncompress.tracing import trace

pytestmark = [
    # Dynamo looks at `grad` of the activations that enter a compiled block (torch 2.13, 2026-11-21).
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # torch's counter of operations has global hooks, and Dynamo would rather not (torch 2.13, 2026-11-21).
    pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning"),
]

READ: dict[str, dict[str, tuple[int, ...]]] = {
    "Banked": {"kernels": (2,), "template": (1,)},
    "Einsum": {"mix": (0,)},
    "Pruned": {"conv.0.weight_orig": (1,), "last.0.weight_orig": (1,)},
    "Quaternion": {f"{conv}.{part}": (1,) for conv in ("q1", "q2") for part in "rijk"},
    "Recurrent": {"lstm.weight_ih_l0": (1,), "lstm.weight_ih_l0_reverse": (1,), "gru.weight_ih_l0": (1,)},
    "Slimmable": {"conv2.weight": (1,)},
    "Tied": {"enc1.weight": (0, 1), "enc2.weight": (0, 1)},
    "TiedLinear": {"project.weight": (0, 1)},
}
"""Parameters that are read otherwise than along dimension 1 of a layer's own weight."""

each = pytest.mark.parametrize("cause", causes.CAUSES)


@cache
def traced(cause: type[nn.Module]) -> tuple[nn.Module, Any, ConvGraph]:
    net, example = causes.make(cause)
    state = torch.get_rng_state()
    graph = trace(net, example)
    assert torch.equal(torch.get_rng_state(), state)
    return net, example, graph


@each
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_the_network_runs_by_itself(cause, batch, training):
    net, example = causes.make(cause, batch=batch)
    found = graph_checks.run(net.train(training), example)
    assert all(t.isfinite().all() for t in found)
    sum(t.sum() for t in found if t.requires_grad).backward()


@each
def test_something_can_be_cut_and_the_cut_network_runs(cause):
    net, example, graph = traced(cause)
    assert graph.groups, graph.pinned
    graph_checks.smaller_and_runs(net, graph, example)


@each
def test_tracing_leaves_the_network_as_it_was(cause):
    net, example = causes.make(cause)
    with graph_checks.left_as_it_was(net):
        trace(net, example)


@each
def test_what_stays_says_why(cause):
    graph_checks.every_width_is_explained(traced(cause)[2])


@each
def test_what_runs_is_counted(cause):
    if cause is causes.causes_control.InferenceGuide and torch.__version__.startswith("2.4."):
        pytest.skip("the counter of torch 2.4 sees nothing in inference mode (pytorch/pytorch#126268)")
    net, example, graph = traced(cause)
    graph_checks.counts_what_runs(net, graph, example)


@pytest.mark.parametrize("cause", [c for c in causes.CAUSES if c not in causes.READ_ACROSS])
def test_cutting_equals_zeroing_what_reads_the_channels(cause):
    net, example, graph = traced(cause)
    assert not graph.rescaled
    graph_checks.equals_zeroed(net, graph, example, READ.get(cause.__name__, {}))


@each
def test_half_the_macs_are_met_where_they_can_be_and_the_plan_is_carried_out(cause):
    net, example, graph = traced(cause)
    reach = Problem(net, graph, get_method("dynet")).reach()
    if reach.lowest <= reach.original / 2:
        plan = make_plan(net, example, "50%")
        graph_checks.lands(plan, 0.5)
    else:
        with pytest.raises(BudgetError):
            make_plan(net, example, "50%")
        plan = make_plan(net, example, str(reach.lowest + 1))
    graph_checks.carries_out(net, plan, example)


@each
def test_its_plan_comes_back_from_its_file(cause):
    net, _, graph = traced(cause)
    problem = Problem(net, graph, get_method("dynet"))
    plan = problem.plan(problem.full, "100%", "uniform")
    assert Plan.from_json(plan.to_json()) == plan
