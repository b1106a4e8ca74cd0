from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import networks
from dyncompress.budget import Budget
from dyncompress.conversion import convert, plan_of
from dyncompress.cost import measure_macs
from dyncompress.errors import BudgetError, DynCompressError, PlanError, UnknownMethodError
from dyncompress.importance import best
from dyncompress.latency import Latency, measure_latency
from dyncompress.latencytable import Device, LatencyTable, Timed
from dyncompress.layers import DyNet
from dyncompress.layers.method import DEFAULT
from dyncompress.plan import Plan
from dyncompress.planning import Problem, make_plan, reachable
from dyncompress.ranking import rank
from dyncompress.tracing import trace


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


class Machine:
    """Its table says that time is MACs; in truth 15 % are overhead. Remembers what students were timed."""

    def __init__(self, folder, overhead: float = 0.15) -> None:
        self.overhead, self.timed = overhead, []
        self.table = LatencyTable(folder=folder, timed=self.alone)

    def alone(self, runs, device) -> Timed:
        ratios = []
        for run in runs:
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                run()
            ratios.append(counter.get_total_flops() / 2e6)
        return Timed(ratios, 1e-6)

    def against_the_original(self, nets, example, batch_sizes, rounds):
        macs = {name: measure_macs(net, example) for name, net in nets.items()}
        share = macs["student"] / macs["original"]
        self.timed.append(share)
        return {"student": {1: Latency(1.0, self.overhead + (1 - self.overhead) * share, 0.0)}}


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr("dyncompress.pacing.measure_latency", made.against_the_original)
    return made


def test_latency_as_the_target(machine):
    """The first student is predicted to be fast enough and isn't: 0.15 + 0.85 * 0.6 = 0.66; the second lands."""
    plan = make_plan(Plain(), X, "60% latency", "static", table=machine.table)
    assert plan.target == "60% latency"
    first, second = machine.timed
    assert 0.58 <= first <= 0.6
    assert plan.ratio == second and 0.576 <= 0.15 + 0.85 * second <= 0.6
    assert plan.latency.measured == pytest.approx(0.15 + 0.85 * second, abs=1e-4)
    assert plan.latency.predicted == pytest.approx(second, abs=2e-3)
    assert "1 thread" in plan.latency.device or "threads" in plan.latency.device


def test_a_latency_out_of_reach_is_told_after_the_narrowest_student_was_timed(machine):
    with pytest.raises(BudgetError, match=r"'14% latency' can't be reached.*fastest student .* takes 1[5-9]%"):
        make_plan(Plain(), X, "14% latency", "static", table=machine.table)
    assert min(machine.timed) == pytest.approx(reachable_share(), rel=0.02)


def reachable_share() -> float:
    reach = reachable(Plain(), X, "static")
    return reach.lowest / reach.original


def test_a_generous_latency_takes_the_widest_student_at_once(machine):
    plan = make_plan(Plain(), X, "150% latency", "static", table=machine.table)
    assert plan.ratio == 1.0 and machine.timed == [1.0]


def test_measurements_close_in_on_a_target_that_predictions_miss(machine):
    """Half of the time is overhead, which the table denies: 0.5 + 0.5 * 0.4 = 0.7."""
    machine.overhead = 0.5
    plan = make_plan(Plain(), X, "70% latency", "static", table=machine.table)
    assert 0.672 <= 0.5 + 0.5 * plan.ratio <= 0.7
    assert plan.ratio == machine.timed[-1] and 2 <= len(machine.timed) <= 4
    assert len(set(machine.timed)) == len(machine.timed)  # no student is timed twice


def test_a_table_of_another_batch_and_what_is_no_table_are_refused(tmp_path):
    with pytest.raises(PlanError, match="of batch 8, and a target in latency is for batch 1"):
        make_plan(Plain(), X, "60% latency", table=LatencyTable(Device.here(batch=8), tmp_path))
    with pytest.raises(PlanError, match=r"table 'mine.json' is no latency table"):
        make_plan(Plain(), X, "60%", table="mine.json")


def test_a_plan_carries_the_latency_that_was_measured(machine):
    plan = make_plan(Plain(), X, "60% latency", "static", table=machine.table)
    assert Plan.from_json(plan.to_json()) == plan
    assert "batch-1 latency, measured 60%, predicted 53%" in " ".join(str(plan).split())
    other = json.loads(plan.to_json())
    other["groups"][0]["keep"] = 8
    assert Plan.from_json(json.dumps(other)).latency is None  # of another student
    assert "latency" not in json.loads(make_plan(Plain(), X, "60%").to_json())


@pytest.mark.slow
def test_latency_as_the_target_by_the_clock(tmp_path):
    """What was measured while planning holds when it is measured again, noise aside."""
    net, x = Plain(), torch.zeros(1, 3, 48, 48)
    plan = make_plan(net, x, "60% latency", "static", table=LatencyTable(folder=tmp_path))
    again = measure_latency({"original": net, "student": convert(net, plan)}, x, batch_sizes=(1,))
    assert again["student"][1].ratio < 0.75
    assert plan.macs_after < plan.macs_before


def test_unreachable_targets_give_the_range():
    net, x = networks.make(networks.HardView)
    with pytest.raises(
        BudgetError, match=r"'5%' \(99.5k MACs\) can't be reached.*\d+k to .*MACs \(.*% to .*%.*last.0: "
    ):
        make_plan(net, x, "5%")
    reach = reachable(net, x)
    assert make_plan(net, x, reach.lowest / reach.original * 1.02).macs_after >= reach.lowest
    with pytest.raises(BudgetError, match="can't be reached"):
        make_plan(net, x, "10G")


@pytest.mark.parametrize(
    ("target", "binds"),
    [("33%, 90% params", "macs"), ("90%, 50% params", "params"), (("60%", "80k params"), "params")],
)
@pytest.mark.parametrize("method", ["static", "dynet"])
def test_several_limits_hold_and_the_one_that_binds_is_landed_on(target, binds, method):
    plan = make_plan(Plain(), X, target, method)
    loads = {limit.quantity: achieved / asked for limit, asked, achieved in plan.asked}
    assert set(loads) == {"macs", "params"}
    assert max(loads.values()) <= 1
    if method == "static":  # a bank multiplies parameters, so that they bind where they would not otherwise
        assert 0.99 <= loads[binds]
    assert 0.99 <= max(loads.values())


def test_parameters_may_grow_within_a_limit():
    free, bound = (make_plan(Plain(), X, target, "dynet") for target in ("75%", "75%, 150% params"))
    assert free.params_ratio > 1.6 and bound.params_ratio <= 1.5
    assert 0.99 <= max(bound.ratio / 0.75, bound.params_ratio / 1.5) <= 1


def test_of_several_limits_the_ones_out_of_reach_are_named():
    with pytest.raises(BudgetError) as raised:
        make_plan(Plain(), X, "50%, 0.1% params", "static")
    said = str(raised.value)
    assert "'0.1% params' (" in said and "'50%'" not in said
    assert "parameters (" in said and "MACs (" not in said
    with pytest.raises(BudgetError, match=r"'0.1%' .* and '0.1% params' .* MACs \(.* and .* parameters \("):
        make_plan(Plain(), X, "0.1%, 0.1% params", "static")


def test_latency_and_parameters_together(machine):
    plan = make_plan(Plain(), X, "60% latency, 20% params", "static", table=machine.table)
    assert plan.target == "60% latency, 20% params"
    assert 0.198 <= plan.params_ratio <= 0.2  # binds: half of the MACs would be fast enough
    assert [limit.quantity for limit, *_ in plan.asked] == ["params"]  # a plan can't tell latencies
    both = make_plan(Plain(), X, "60% latency, 40%", "static", table=machine.table)
    assert 0.39 <= both.ratio <= 0.4
    with pytest.raises(BudgetError, match=r"'0.1% params' .* can't be reached"):
        make_plan(Plain(), X, "60% latency, 0.1% params", "static", table=machine.table)
    with pytest.raises(BudgetError, match=r"'0.1%' .* can't be reached"):
        make_plan(Plain(), X, "60% latency, 0.1%", "static", table=machine.table)


def test_a_target_is_never_exceeded_not_even_at_the_end_of_the_range():
    reach = reachable(Plain(), X, "static")
    assert make_plan(Plain(), X, reach.lowest, "static").macs_after == reach.lowest
    with pytest.raises(BudgetError, match="can't be reached"):
        make_plan(Plain(), X, reach.lowest - 1, "static")
    assert reachable(Plain(), X, "static", quantity="params").original == sum(p.numel() for p in Plain().parameters())


def test_layers_that_keep_their_width_become_dynamic():
    plan = make_plan(Plain(), X, "70%", "dynet", floors={"2": 1.0})
    row = next(r for r in plan.layers if r.name == "2")
    assert (row.out_before, row.out_after, row.method) == (128, 128, "dynet")
    assert 0.693 <= plan.ratio <= 0.7


@pytest.mark.parametrize("pattern", ["4", nn.Conv2d])
def test_layers_that_are_to_stay_static_are_narrowed(pattern):
    plan = make_plan(Plain(), X, "40%", "dynet", static=(pattern,))
    row = next(r for r in plan.layers if r.name == "4")
    assert row.method == "static" and row.out_after < row.out_before and "asked by" in row.reason
    assert 0.396 <= plan.ratio <= 0.4
    dynamic = {r.name for r in plan.layers if r.method == "dynet"}
    assert dynamic == ({"2"} if pattern == "4" else set())


def test_what_is_ignored_and_asked_to_be_static_is_ignored():
    (row,) = (r for r in make_plan(Plain(), X, "80%", ignore=("2",), static=("2",)).layers if r.name == "2")
    assert row.out_after == row.out_before and row.reason == "ignored by '2'"


class Rigid(nn.Module):
    """Every width is written into the code, so that nothing can be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return self.second(self.first(x).view(-1, 16, 16, 16)).view(-1, 16, 16, 16)


def test_a_network_that_can_not_be_narrowed_can_still_be_dynamic():
    net = Rigid()
    reach = reachable(net, X, "dynet")
    # two convolutions of 256 positions; the second assembles 4 kernels, its router reads 16 channels
    assert reach.original == 256 * (3 * 16 * 9 + 16 * 16 * 9)
    assert reach.lowest == reach.highest == reach.original + 4 * 16 * 16 * 9 + 16 * 16 * 4
    for target in (reach.highest, "2M"):
        plan = make_plan(net, X, target, "dynet")
        assert [c.method.name for c in plan.choices] == ["static", "dynet"] and plan.macs_after == reach.highest
        student = convert(net, plan)
        assert torch.allclose(student(X), net(X), atol=1e-4)
    for target in ("100%", "50%", reach.highest - 1):
        with pytest.raises(BudgetError, match=r"\(101.5% to 101.5% of 700k\); no width can change; ask for 710656"):
            make_plan(net, X, target, "dynet")
    assert make_plan(net, X, "100%", "static").ratio == 1


@pytest.mark.parametrize("name", ["bn", "taylor"])
def test_channels_that_another_importance_chose_are_named_in_the_plan(name):
    net, x = networks.make(networks.Residual)
    batches = [(x, torch.tensor([0, 1]))] if name == "taylor" else None
    plan = make_plan(net, x, "50%", importance=name, batches=batches)
    scores = rank(net, trace(net, x), name, batches).scores
    for kept, score in zip(plan.keep, scores, strict=True):
        if not isinstance(kept, int):
            assert kept == best(score, len(kept))
    assert plan.importance == name and f"channels by {name}" in str(plan)
    assert plan.widths == make_plan(net, x, "50%").widths  # which channels, and not how many
    student = convert(net, plan)
    assert plan_of(student).keep == tuple(k if not isinstance(k, int) else tuple(range(k)) for k in plan.keep)


def test_importance_decides_how_many_with_the_allocation_of_that_name():
    net, x = networks.make(networks.Residual)
    for norm in (net.blocks[1].bn1, net.blocks[2].bn1):
        norm.weight.data[:] = 1.0
    net.blocks[1].bn1.weight.data[8:] = 0.01  # three quarters of this group are worth nothing
    plan = make_plan(net, x, "60%", "static", allocation="importance", importance="bn")
    widths = {group.name: width for group, width in zip(plan.graph.groups, plan.widths, strict=True)}
    assert widths["blocks.1.conv1"] < widths["blocks.2.conv1"]
    assert 0.594 <= plan.ratio <= 0.6


def test_static_plans_have_no_dynamic_layer_and_the_stem_stays_static():
    assert {c.method.name for c in make_plan(Plain(), X, "50%", "static").choices} == {"static"}
    choices = make_plan(Plain(), X, "50%", "dynet").choices
    assert [c.method.name for c in choices] == ["static", "dynet", "dynet"]
    assert "reads the input" in choices[0].reason


def test_by_default_every_layer_has_the_method_that_is_worth_most_there():
    plan = make_plan(Plain(), X, "50%")
    assert plan == make_plan(Plain(), X, "50%", "auto") and plan.method == DEFAULT == "auto"
    assert [c.method.name for c in plan.choices] == ["static", "odconv", "odconv"]
    assert str(reachable(Plain(), X)) == str(reachable(Plain(), X, "auto"))


def test_layers_of_a_residual_block_share_a_router_and_others_have_their_own():
    net, x = networks.make(networks.Residual)
    shares = {c.name: c.share for c in make_plan(net, x, "50%", "dynet").choices}
    assert shares["blocks.1.conv1"] == shares["blocks.1.conv2"] == "blocks.1"
    assert shares["blocks.1.down.0"] == ""  # static
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
    assert rows["reduce"].method == "static" and "tiny" in rows["reduce"].reason


def test_nothing_is_touched():
    net, x = networks.make(networks.Residual)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    make_plan(net, x, "50%")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"target": "50%", "method": "dynett"}, UnknownMethodError, "did you mean 'dynet'"),
        ({"target": "50%", "method": "dynet", "options": {"gg": 2}}, DynCompressError, "no option 'gg'"),
        ({"target": "50%", "options": {"rate": 0}}, DynCompressError, "rate 0 is no positive number"),
        ({"target": "50%", "options": [2]}, DynCompressError, "no mapping of names"),
        ({"target": "50%", "method": DyNet(), "options": {"g": 2}}, PlanError, "give its name instead"),
        ({"target": "50%", "allocation": "random"}, PlanError, "choose one of uniform, importance, sensitivity"),
        ({"target": "50%", "importance": "random"}, PlanError, "choose one of magnitude, bn, taylor"),
        ({"target": "50%", "importance": "taylor"}, PlanError, "pass batches="),
        ({"target": "50%", "importance": "bn"}, PlanError, "pass a BatchNorm"),
        ({"target": "50%", "static": ("layr",)}, PlanError, "static 'layr' matches no layer"),
        ({"target": "50%", "floors": {"layr": 8}}, PlanError, "floors 'layr' matches no layer"),
        ({"target": "50%", "floors": {"0": 65}}, PlanError, "give 1 to 64"),
        ({"target": "50%, 40%"}, BudgetError, "limits MACs twice"),
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
    problem = Problem(net, trace(net, x), DyNet())
    monkeypatch.setattr(nn.Module, "__init__", lambda *_: pytest.fail("a module was built"))
    assert problem.solve(Budget.parse("50%"), "uniform", 0.01).ratio <= 0.5


def test_widths_that_the_code_cannot_follow_are_found_before_the_plan_is_given_out():
    """The graph is verified at widths of its own; only the plan's tell that this network wants at least 14."""

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 48, 3)
            self.third = nn.Conv2d(48, 5, 3)

        def forward(self, x):
            x = self.first(x)
            if x.shape[1] < 14:
                raise ValueError("at least fourteen channels, please")
            return self.third(self.second(x)).mean((2, 3))

    net, x = Picky(), torch.zeros(1, 3, 12, 12)
    assert [g.name for g in trace(net, x).groups] == ["first", "second"]
    plan = make_plan(net, x, "25%", "static")
    assert "at least fourteen" in plan.graph.pinned["first"]
    assert plan.ratio <= 0.25
    assert convert(net, plan)(x).shape == (1, 5)
