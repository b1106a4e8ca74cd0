from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import networks
from dyncompress.budget import Budget
from dyncompress.errors import BudgetError
from dyncompress.latencytable import LatencyTable, Timed
from dyncompress.layers import DyNet, Static
from dyncompress.plan import Plan
from dyncompress.planning import Problem, make_plan
from dyncompress.prediction import Prediction, Rest, shipped, sizes, unchanged
from dyncompress.tracing import trace
from dyncompress.worth import placed, worth

X = torch.zeros(1, 3, 16, 16)


def macs(runs, device) -> Timed:
    """A machine whose time is the MACs: a thousand are one unit, which takes a microsecond."""
    ratios = []
    for run in runs:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            run()
        ratios.append(counter.get_total_flops() / 2000)
    return Timed(ratios, 1e-6)


def prediction(net: nn.Module, tmp_path, timed=macs) -> Prediction:
    return Prediction(net, X, trace(net, X), LatencyTable(folder=tmp_path, timed=timed))


def test_the_rest_is_a_line_through_two_networks():
    assert Rest.through((30.0, 5.0), (10.0, 3.0)).time(20.0) == pytest.approx(4.0)
    assert Rest.through((30.0, 5.0), (30.0, 3.0)) == Rest(5.0, 0.0)  # nothing can be narrowed


def test_where_time_is_macs_the_prediction_is_the_plans_ratio(tmp_path):
    """The convolutions add up; what is left of the time, the linear layer's, is linear in its one width."""
    net = networks.Residual()
    found = prediction(net, tmp_path)
    for target in ("70%", "40%"):
        plan = make_plan(net, X, target, "static")
        assert found.ratio(plan) == pytest.approx(plan.ratio, rel=2e-3)
        assert found.seconds(plan) == pytest.approx(plan.macs_after * 1e-9, rel=2e-3)
    assert found.ratio(unchanged(found.graph)) == pytest.approx(1.0)


def test_activations_are_what_convolutions_write(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1))
    found = prediction(net, tmp_path)
    assert found.activations([8]) == 8 * 16 * 16 + 4 * 8 * 8
    assert found.activations([2]) == 2 * 16 * 16 + 4 * 8 * 8


class Windows(nn.Module):
    """A convolution that runs on the image, and on its four quarters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.conv(self.stem(x))
        return self.conv(F.unfold(x, 8, stride=8).view(-1, 8, 8, 8, 4).permute(0, 4, 1, 2, 3).flatten(0, 1))


def test_a_layer_has_an_entry_for_every_input_that_it_gets(tmp_path):
    net = Windows().train()
    graph = trace(net, X)
    assert sizes(net, graph, torch.zeros(3, 3, 16, 16)) == {
        "stem": [(1, (16, 16))],
        "conv": [(1, (16, 16)), (4, (8, 8))],
    }
    assert net.training
    found = prediction(net, tmp_path)
    plan = unchanged(graph)
    told = [str(each) for each in found.entries(plan.costs, plan.widths)]
    assert told[1:] == ["static(): 8 -> 8, 3x3, padding 1 at 16x16", "static(): 8 -> 8, 3x3, padding 1 at 4 of 8x8"]


def test_layers_that_share_a_router_are_one_entry_and_folded_norms_leave_a_bias(tmp_path):
    net = networks.Residual()
    graph = trace(net, X)
    plan = Problem(net, graph, DyNet(placement="all")).plan([g.channels for g in graph.groups], "1G", "uniform")
    entries = prediction(net, tmp_path).entries(plan.costs, plan.widths)
    blocks = [each for each in entries if len(each.runs) > 1]
    assert [len(each.runs) for each in blocks] == [2, 3, 2]
    assert all(run.spec.bias for each in entries for run in each.runs)


# ---- worth -------------------------------------------------------------------------------------------------------


class Priced:
    """A timer that knows what layers are: 1 unit a static convolution, ``1 + bank`` units one with a bank of g / 4.

    A router costs one unit more, once per set.
    """

    def __init__(self, bank: float, router: float) -> None:
        self.bank, self.router = bank, router

    def __call__(self, runs, device) -> Timed:
        return Timed([1.0 for _ in runs], 1e-5)

    def price(self, layers) -> float:
        if isinstance(layers.method, Static):
            return float(len(layers.runs))
        return len(layers.runs) * (1 + self.bank * layers.method.g / 4) + self.router


def priced(tmp_path, monkeypatch, bank: float, router: float = 0.0) -> tuple[Prediction, Plan]:
    timer = Priced(bank, router)
    monkeypatch.setattr(LatencyTable, "times", lambda self, layers: [timer.price(each) for each in layers])
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), networks.Residual.Block(8, 8, 1))
    graph = trace(net, X)
    found = Prediction(net, X, graph, LatencyTable(folder=tmp_path, timed=timer))
    found.table.reference = 1e-5
    problem = Problem(net, graph, DyNet(placement="all"))
    return found, problem.plan([g.channels for g in graph.groups], "1G", "uniform")


def test_what_a_bank_adds_is_told_per_layer(tmp_path, monkeypatch):
    found, plan = priced(tmp_path, monkeypatch, bank=0.25)
    told = worth(found, plan.costs, plan.widths)
    assert [w.name for w in told] == ["1.conv1", "1.conv2"]  # the first convolution is static
    assert [w.overhead for w in told] == pytest.approx([0.25, 0.25])
    threads = torch.get_num_threads()
    told_threads = f"{threads} thread{'s' * (threads != 1)}"
    assert str(told[0]) == f"measured 12.5 us dynamic against 10 us static at 16x16, {told_threads}"


def test_no_layer_is_measured_right_after_another_form_of_itself(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(LatencyTable, "times", lambda self, layers: asked.append(list(layers)) or [1.0] * len(layers))
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 64, 3))
    plan = make_plan(net, X, "60%", DyNet(placement="all"))
    worth(prediction(net, tmp_path), plan.costs, plan.widths)
    first = [(type(each.method), getattr(each.method, "g", 0), each.runs[0].spec.in_channels) for each in asked[0]]
    narrow, wide = plan.widths  # the inputs of both dynamic layers
    assert first == [(Static, 0, narrow), (Static, 0, wide), *((DyNet, g, w) for g in (4, 2) for w in (narrow, wide))]


@pytest.mark.parametrize(
    ("bank", "router", "methods", "reason"),
    [
        (0.25, 0.0, [4, 4], ""),  # a quarter more: worth it
        (0.8, 0.0, [2, 2], "g 4 -> 2: measured 36 us with 4 kernels against 20 us static, of its block"),
        (2.0, 0.0, [0, 0], "static: measured 20 us dynamic against 10 us static at 16x16"),
        (0.1, 2.0, [0, 0], "static: measured"),  # a router that costs more than both
    ],
)
def test_a_bank_that_is_not_worth_its_time_is_halved_then_left_out(
    tmp_path, monkeypatch, bank, router, methods, reason
):
    found, plan = priced(tmp_path, monkeypatch, bank, router)
    choices = placed(found, plan.costs, plan.widths)
    assert [c.name for c in choices] == [op.module for op in plan.graph.convs]
    assert [getattr(c.method, "g", 0) for c in choices[1:]] == methods
    assert all(reason in c.reason for c in choices[1:])
    assert choices[0] == plan.choices[0]


def test_a_limit_decides_what_is_worth_it(tmp_path, monkeypatch):
    found, plan = priced(tmp_path, monkeypatch, bank=0.25)
    choices = placed(found, plan.costs, plan.widths, limit=0.1)
    assert all(isinstance(c.method, Static) for c in choices)


def test_a_table_places_by_the_clock_whatever_the_target(tmp_path, monkeypatch):
    timer = Priced(bank=2.0, router=0.0)
    monkeypatch.setattr(LatencyTable, "times", lambda self, layers: [timer.price(each) for each in layers])
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 64, 3))
    table = LatencyTable(folder=tmp_path, timed=timer)
    table.reference = 1e-5
    with_table = make_plan(net, X, "60%", DyNet(placement="all"), table=table)
    without = make_plan(net, X, "60%", DyNet(placement="all"))
    assert [c.method.name for c in without.choices] == ["static", "dynet", "dynet"]
    assert [c.method.name for c in with_table.choices] == ["static", "static", "static"]
    assert "static: measured 20 us dynamic against 10 us static at 16x16" in with_table.choices[2].reason
    assert 0.594 <= with_table.ratio <= 0.6
    assert with_table.latency is None  # none was asked for


def test_shipped_networks_have_no_batchnorm_left():
    net = networks.Residual()
    plan = make_plan(net, X, "60%")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in shipped(net, plan).modules())


def test_a_target_in_latency_is_refused_for_what_other_limits_do_not_allow(tmp_path):
    with pytest.raises(BudgetError, match=r"'0.1% params'"):
        make_plan(networks.Residual(), X, "60% latency, 0.1% params", table=LatencyTable(folder=tmp_path, timed=macs))
    assert Budget.parse("60% latency").limit("latency") is not None
