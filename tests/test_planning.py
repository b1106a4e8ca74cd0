from __future__ import annotations

import pytest
import torch
from torch import nn

import networks
from dyncompress.conversion import convert
from dyncompress.cost import measure_macs
from dyncompress.errors import BudgetError, DynCompressError, PlanError, UnknownMethodError
from dyncompress.graph import trace
from dyncompress.latency import Latency, measure_latency
from dyncompress.layers import DyNet
from dyncompress.planning import make_plan, reachable


class Plain(nn.Sequential):
    """Wide enough for every target."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


X = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize("target", ["75%", "50%", "33%", "25%", "10%"])
@pytest.mark.parametrize("method", ["static", "dynet"])
@pytest.mark.parametrize("allocation", ["uniform", "importance"])
def test_macs_land_within_one_percent_and_never_above(target, method, allocation):
    plan = make_plan(Plain(), X, target, method, allocation=allocation)
    asked = float(target.rstrip("%")) / 100
    assert 0.99 * asked <= plan.ratio <= asked


def test_parameters_as_the_target():
    plan = make_plan(Plain(), X, "40% params")
    assert 0.396 <= plan.params_after / plan.params_before <= 0.4
    plan = make_plan(Plain(), X, "100k params", "static")
    assert 99_000 <= plan.params_after <= 100_000


def test_absolute_macs():
    assert 9.9e6 <= make_plan(Plain(), X, "10M").macs_after <= 10e6


def clock(nets, example, batch_sizes):
    """A machine whose time is 15 % overhead and 80 % of the MACs."""
    macs = {name: measure_macs(net, example) for name, net in nets.items()}
    return {
        name: {1: Latency(median_ms=1.0, ratio=0.15 + 0.8 * macs[name] / macs["original"], iqr=0.0)} for name in nets
    }


def test_latency_as_the_target(monkeypatch):
    monkeypatch.setattr("dyncompress.planning.measure_latency", clock)
    plan = make_plan(Plain(), X, "60% latency", "static")
    assert plan.target == "60% latency"
    assert 0.54 <= plan.ratio <= 0.5625  # 0.15 + 0.8 * 0.5625 = 0.6; eight halvings of the range, 1 % below each
    with pytest.raises(BudgetError, match=r"'10% latency' can't be reached.*fastest student .* takes 1\d%"):
        make_plan(Plain(), X, "10% latency")


@pytest.mark.slow
def test_latency_as_the_target_by_the_clock():
    """What was measured while planning holds when it is measured again, noise aside."""
    net, x = Plain(), torch.zeros(1, 3, 48, 48)
    plan = make_plan(net, x, "60% latency", "static")
    again = measure_latency({"original": net, "student": convert(net, plan)}, x, batch_sizes=(1,))
    assert again["student"][1].ratio < 0.75
    assert plan.macs_after < plan.macs_before


def test_unreachable_targets_give_the_range():
    net, x = networks.make(networks.HardView)
    with pytest.raises(
        BudgetError, match=r"'5%' \(99.5k MACs\) can't be reached.*\d+k to .*MACs \(.*% to .*%.*last.0: its code"
    ):
        make_plan(net, x, "5%")
    reach = reachable(net, x)
    assert make_plan(net, x, reach.lowest / reach.original * 1.02).macs_after >= reach.lowest
    with pytest.raises(BudgetError, match="can't be reached"):
        make_plan(net, x, "10G")


def test_static_plans_have_no_dynamic_layer_and_the_stem_stays_static():
    assert {c.method.name for c in make_plan(Plain(), X, "50%", "static").choices} == {"static"}
    choices = make_plan(Plain(), X, "50%").choices
    assert [c.method.name for c in choices] == ["static", "dynet", "dynet"]
    assert "reads the input" in choices[0].reason


def test_layers_of_a_residual_block_share_a_router_and_others_have_their_own():
    net, x = networks.make(networks.Residual)
    shares = {c.name: c.share for c in make_plan(net, x, "50%").choices}
    assert shares["blocks.1.conv1"] == shares["blocks.1.conv2"] == shares["blocks.1.down.0"] == "blocks.1"
    alone = make_plan(net, x, "50%", DyNet(router="layer")).choices
    assert {c.share for c in alone} == {""}


@pytest.mark.parametrize("pattern", ["2", "[2]", "Linear", nn.Linear])
def test_ignored_layers_stay_as_they_are(pattern):
    plan = make_plan(Plain(), X, "80%", ignore=(pattern,))
    name = "2" if isinstance(pattern, str) and "2" in pattern else "8"
    row = next(r for r in plan.layers if r.name == name)
    assert (row.in_before, row.out_before, row.method) == (row.in_after, row.out_after, "static")


def test_depthwise_and_small_maps_say_why_they_stay_static():
    net, x = networks.make(networks.Inverted)
    rows = {r.name: r for r in make_plan(net, x, "60%").layers}
    assert rows["depthwise.0"].method == "static" and "depthwise" in rows["depthwise.0"].reason
    assert rows["reduce"].method == "static" and "1 position" in rows["reduce"].reason


def test_nothing_is_touched():
    net, x = networks.make(networks.Residual)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    make_plan(net, x, "50%")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"target": "50%", "method": "dynett"}, UnknownMethodError, "did you mean 'dynet'"),
        ({"target": "50%", "options": {"gg": 2}}, DynCompressError, "no option 'gg'"),
        ({"target": "50%", "method": DyNet(), "options": {"g": 2}}, PlanError, "give its name instead"),
        ({"target": "50%", "allocation": "random"}, PlanError, "choose one of uniform, importance"),
        ({"target": "50%", "ignore": ("layr",)}, PlanError, "matches no layer"),
        ({"target": "50%", "min_width": 0}, PlanError, "not a positive integer"),
        ({"target": "50%", "tolerance": 2}, BudgetError, "between 0 and 1"),
        ({"target": 0}, BudgetError, "must be positive"),
    ],
)
def test_bad_arguments(arguments, error, said):
    with pytest.raises(error) as raised:
        make_plan(Plain(), X, **arguments)
    assert said in str(raised.value)


def test_planning_is_integer_arithmetic(monkeypatch):
    """No layer is built while widths are searched."""
    net, x = networks.make(networks.Residual)
    graph = trace(net, x)
    monkeypatch.setattr("dyncompress.planning.trace", lambda *_: graph)
    monkeypatch.setattr(nn.Module, "__init__", lambda *_: pytest.fail("a module was built"))
    assert make_plan(net, x, "50%").ratio <= 0.5
