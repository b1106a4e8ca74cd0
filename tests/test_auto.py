"""Plans made with method "auto": what layers get by MACs, by parameters and by the clock of a made-up machine."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import nn

import networks
from dyncompress.conversion import convert
from dyncompress.cost import static_choices
from dyncompress.exporting import export
from dyncompress.formats import reopen
from dyncompress.latency import Latency
from dyncompress.latencytable import LatencyTable, Timed
from dyncompress.layers import Auto, DynamicConv, DyNet, ODConv, Static
from dyncompress.plan import Plan
from dyncompress.planning import Problem, make_plan, reachable
from dyncompress.prediction import Prediction
from dyncompress.tracing import trace
from dyncompress.worth import chosen

X = torch.zeros(1, 3, 16, 16)
WIDE = torch.zeros(1, 3, 112, 112)


def micros(layers) -> float:
    """A machine of 25,000 MACs in a microsecond, where attention takes 30 microseconds and a bank of g kernels 10 g."""
    (run,) = layers.runs
    positions = torch.Size(run.spec.output_size(run.size)).numel()
    extra = {ODConv: 30.0, DyNet: 10.0 * getattr(layers.method, "g", 0), Static: 0.0}
    return run.spec.kernel_params * positions / 25_000 + extra[type(layers.method)]


@pytest.fixture
def table(monkeypatch, tmp_path) -> LatencyTable:
    monkeypatch.setattr(LatencyTable, "times", lambda self, layers: [micros(each) for each in layers])
    made = LatencyTable(folder=tmp_path)
    made.reference = 1e-6
    return made


def large_and_small() -> nn.Sequential:
    """16 -> 16 channels on 112x112 positions, and 16 -> 64 on 7x7."""
    convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 16), (16, 16), (16, 64), (64, 8))]
    return nn.Sequential(convs[0], convs[1], nn.AvgPool2d(16), convs[2], convs[3])


def reasons(choices) -> dict[str, str]:
    return {choice.name: choice.reason for choice in choices}


def test_by_the_clock_a_large_map_is_dynamic_and_a_small_one_is_not(table):
    """28.9 M MACs take 1156 us, 30 more are 2.6 %; 451,584 MACs take 18.1 us, 20 (of g = 2) more are 111 %."""
    net = large_and_small()
    graph = trace(net, WIDE)
    problem = Problem(net, graph, Auto("time"))
    assert [choice.method for choice in problem.choices] == [Static()] * 4
    found = chosen(Auto("time"), Prediction(net, WIDE, graph, table), problem.model, problem.full, problem.free)
    assert [choice.method.name for choice in found] == ["static", "odconv", "static", "static"]
    told = reasons(found)
    assert told["0"] == "static: the first convolution, which reads the input"
    assert told["1"] == "attention to channels adds 2.6% to 1.16 ms, worth up to 28%"
    assert told["3"] == "static: g=2 would add 111% to 18.1 us, worth at most 13%"


def test_forms_of_one_layer_never_run_one_after_the_other(table, monkeypatch):
    """The second would find its input in the cache: all layers run in one form, then in the next, each shape once."""
    asked = []
    monkeypatch.setattr(LatencyTable, "times", lambda self, layers: asked.append(layers) or [1.0] * len(layers))
    make_plan(networks.Residual(), X, "60%", "auto", table=table)
    forms = [Static(), ODConv(spatial=False), DyNet(g=4, router="layer"), DyNet(g=2, router="layer")]
    assert [method for method, _ in groupby(asked[0], lambda each: each.method)] == forms
    runs = {form: [each.runs for each in asked[0] if each.method == form] for form in forms}
    assert runs[forms[0]] == runs[forms[1]]  # in the order of the network
    assert len(set(asked[0])) == len(asked[0])


def test_with_a_table_the_clock_chooses_at_the_widths_of_a_static_network(table):
    """At 60 % of the MACs the large layer has 13 of 16 channels or fewer: 763 us at most, of which 30 are 3.9 %."""
    plan = make_plan(large_and_small(), WIDE, "60%", "auto", table=table)
    static = make_plan(large_and_small(), WIDE, "60%", "static")
    assert plan.options["cost"] == "time"
    assert [choice.method.name for choice in plan.choices] == ["static", "odconv", "static", "static"]
    (width,) = {channels for channels in static.widths[:2]}
    alone = width * width * 9 * 112 * 112 / 25_000
    assert plan.choices[1].reason == (f"attention to channels adds {30 / alone:.1%} to {alone:.3g} us, worth up to 28%")
    assert 0.594 <= plan.ratio <= 0.6


def test_asked_to_count_time_it_takes_the_users_table(table, monkeypatch):
    monkeypatch.setattr("dyncompress.pacing.LatencyTable", lambda device: table)
    by_time = make_plan(large_and_small(), WIDE, "60%", "auto", options={"cost": "time"})
    by_macs = make_plan(large_and_small(), WIDE, "60%", "auto")
    assert by_time.choices[2].method == Static()
    assert by_macs.options["cost"] == "macs" and by_macs.choices[2].method == ODConv(spatial=False)


def test_a_layer_that_is_to_be_static_or_ignored_is_never_chosen_for(table):
    plan = make_plan(large_and_small(), WIDE, "60%", "auto", table=table, static=["1"], ignore=["3"])
    assert {choice.method for choice in plan.choices} == {Static()}
    assert reasons(plan.choices)["1"] == "static: asked by '1'" and reasons(plan.choices)["3"] == "ignored by '3'"


@pytest.mark.parametrize(("target", "cost"), [("45%", "macs"), ("45%, 60% params", "params"), ("60% params", "params")])
def test_the_target_says_what_costs_are(target, cost):
    plan = make_plan(networks.Residual(), X, target, "auto")
    assert plan.options["cost"] == cost and plan.method == "auto"


def test_a_target_in_latency_counts_time(monkeypatch, tmp_path):
    """Every pass of this machine takes a microsecond: forms cost the same, and the one of most worth is chosen."""
    monkeypatch.setattr(
        "dyncompress.pacing.measure_latency", lambda *_, **__: {"student": {1: Latency(1.0, 0.79, 0.0)}}
    )
    table = LatencyTable(folder=tmp_path, timed=lambda runs, device: Timed([1.0] * len(runs), 1e-6))
    plan = make_plan(networks.Residual(), X, "80% latency", "auto", table=table)
    assert plan.options["cost"] == "time" and plan.latency.measured == 0.79
    inside = [choice for choice in plan.choices if choice.method != Static()]
    assert {choice.method for choice in inside} == {ODConv(spatial=False)}
    assert {choice.reason for choice in inside} == {"attention to channels adds under 0.1% to 1 us, worth up to 28%"}


def test_what_was_asked_goes_before_the_target():
    plan = make_plan(networks.Residual(), X, "60% params", "auto", options={"cost": "macs", "rate": 3})
    assert plan.options == {"cost": "macs", "rate": 3}


def test_parameters_make_narrow_layers_static():
    """16 -> 16, 3x3: 2,304 weights; attention has 17 * 16 + 17 * 32 = 816, 35 %. 32 -> 32: 1,616 of 9,216, 18 %."""
    told = reasons(make_plan(networks.Residual(), X, "60% params", "auto").choices)
    assert (
        told["blocks.0.conv1"] == "static: attention to channels would add 35% to 2,304 parameters, worth at most 28%"
    )
    assert told["blocks.2.conv1"] == "attention to channels adds 18% to 9,216 parameters, worth up to 28%"


def test_by_macs_every_3x3_layer_of_a_resnet_but_the_first_has_attention_to_channels():
    plan = make_plan(networks.Residual(), X, "45%", "auto")
    convs = {op.module: op.spec.kernel_size for op in plan.graph.convs}
    methods = {c.name: c.method for c in plan.choices if convs[c.name] == (3, 3)}
    assert methods.pop("stem.0") == Static()
    assert len(methods) == 6 and set(methods.values()) == {ODConv(spatial=False)}


def test_the_reach_is_that_of_the_choices():
    net = networks.Residual()
    assert str(reachable(net, X, "auto")) == str(reachable(net, X, "odconv", options={"spatial": False}))
    assert str(reachable(net, X, Auto("time"))) == str(reachable(net, X, "static"))  # before it is measured


def test_the_reach_is_that_of_the_plan_for_the_target():
    """By parameters the narrow layers are static: fewer weights, and fewer MACs for routers."""
    net, method = networks.Residual(), "auto"
    by_params = reachable(net, X, method, target="60% params")
    assert by_params.lowest < reachable(net, X, method).lowest
    for target, quantity in (("60% params", "params"), ("45%, 60% params", "macs")):
        cost = reachable(net, X, method, options={"cost": "params"}, quantity=quantity)
        assert str(reachable(net, X, method, quantity=quantity, target=target)) == str(cost)
    assert str(reachable(net, X, method, target="60% latency")) == str(reachable(net, X, "static"))


@pytest.fixture
def student():
    net, x = networks.make(networks.Residual)
    plan = make_plan(net, x, "45%", "auto")
    return net, x, plan


def test_a_plan_holds_the_choices_and_reads_back(student):
    plan = student[2]
    again = Plan.from_json(plan.to_json())
    assert again == plan and '"method": "odconv"' in plan.to_json()
    assert not any(isinstance(choice.method, Auto) for choice in plan.choices)
    assert "auto at 45%" in str(plan)


def test_a_student_starts_as_the_static_network_and_exports(student, tmp_path):
    net, x, plan = student
    made = convert(net, plan).eval()
    static = convert(net, replace(plan, choices=tuple(static_choices(plan.graph, Static())))).eval()
    assert sum(isinstance(m, DynamicConv) for m in made.modules()) == 6
    with torch.no_grad():
        expected = static(x)
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-6)
        for name, p in made.named_parameters():
            if "router" in name:
                p.add_(0.1 * torch.randn_like(p))
        answer = made(x)
        assert (answer - expected).abs().max() > 1e-3  # it is dynamic now
        torch.testing.assert_close(reopen(export(made, tmp_path / "s.pt2", x))(x), answer, rtol=1e-4, atol=1e-5)
