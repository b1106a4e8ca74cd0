from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import networks
from dyncompress.conversion import convert
from dyncompress.errors import PlanError
from dyncompress.planning import make_plan
from dyncompress.sensitivity import Sensitivity, measure
from dyncompress.tracing import trace

X = torch.zeros(1, 3, 8, 8)


def chain(first=16, second=16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, first, 1), nn.Conv2d(first, second, 1), nn.Conv2d(second, 4, 1))


def widths(net: nn.Module) -> tuple[int, int]:
    return net[0].out_channels, net[1].out_channels


def first_matters(net: nn.Module) -> float:
    """Every channel of the first group is worth 0.05; those of the second 0.001."""
    first, second = widths(net)
    return 0.05 * first + 0.001 * second


def test_one_group_is_cut_at_a_time_and_the_network_stays():
    net, seen = chain(), []
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def score(net: nn.Module) -> float:
        seen.append(widths(net))
        return first_matters(net)

    found = measure(net, X, score, shares=(0.75, 0.5))
    assert seen == [(16, 16), (12, 16), (8, 16), (16, 12), (16, 8)]
    assert found.baseline == pytest.approx(0.816)
    assert found.scores == {"0": {12: pytest.approx(0.616), 8: pytest.approx(0.416)},
                            "1": {12: pytest.approx(0.812), 8: pytest.approx(0.808)}}  # fmt: skip
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_channels_that_matter_least_go():
    net = chain()
    net[0].weight.data[5:] = 0.0  # the first five are all that is left by magnitude

    def score(net: nn.Module) -> float:
        return float(net[0].weight.detach().abs().sum())

    found = measure(net, X, score, shares=[5 / 16])
    assert found.scores["0"][5] == pytest.approx(found.baseline)


def test_drops_are_interpolated_and_never_fall_towards_narrower_widths():
    found = Sensitivity("", 0.9, {"g": {12: 0.95, 8: 0.8, 6: 0.85, 4: 0.5}})
    drops = found.drops("g", 16)
    # 12 channels score more than all 16: no drop. 6 score more than 8: the drop of 8, 0.1, holds.
    assert drops[[16, 14, 12, 10, 8, 7, 6, 5, 4]] == pytest.approx([0, 0, 0, 0.05, 0.1, 0.1, 0.1, 0.25, 0.4])
    assert drops[[3, 2]] == pytest.approx([0.55, 0.7])  # on along the last line
    assert len(drops) == 17 and (np.diff(drops) <= 1e-12).all()


def test_a_plateau_is_no_promise_beyond_its_end():
    drops = Sensitivity("", 0.9, {"g": {8: 0.8, 4: 0.8}}).drops("g", 14)
    assert drops[[8, 6, 4, 3, 0]] == pytest.approx([0.1, 0.1, 0.1, 0.11, 0.14])  # 0.1 over ten channels


@pytest.mark.parametrize("seed", range(5))
def test_drops_are_monotone_whatever_was_measured(seed):
    draw = np.random.default_rng(seed)
    kept = draw.choice(np.arange(1, 40), 6, replace=False)
    drops = Sensitivity("", 0.5, {"g": {int(k): float(draw.random()) for k in kept}}).drops("g", 40)
    assert drops[-1] == 0 and (np.diff(drops) <= 1e-12).all()


def test_the_allocation_spares_what_the_score_depends_on():
    net = chain(64, 64)
    found = measure(net, X, first_matters)
    plan = make_plan(net, X, "50%", "static", allocation="sensitivity", sensitivity=found)
    even = make_plan(net, X, "50%", "static")
    assert 0.495 <= plan.ratio <= 0.5
    assert plan.widths[0] > even.widths[0] and plan.widths[1] < even.widths[1]
    assert first_matters(convert(net, plan)) > first_matters(convert(net, even))
    assert plan.allocation == "sensitivity" and "widths: sensitivity" in str(plan)


def test_where_nothing_is_lost_the_allocation_is_even():
    net = chain(64, 64)
    plan = make_plan(net, X, "50%", "static", allocation="sensitivity", sensitivity=measure(net, X, lambda net: 1.0))
    assert abs(plan.widths[0] - plan.widths[1]) <= 16


def test_the_predicted_drop_is_no_larger_than_that_of_other_allocations():
    net, x = networks.make(networks.Residual)
    net.eval()
    reference = net(x).detach()

    def score(net: nn.Module) -> float:
        return -float((net(x) - reference).square().mean())

    found = measure(net, x, score)
    graph = trace(net, x)
    drops = [found.drops(g.name, g.channels) for g in graph.groups]

    def predicted(plan) -> float:
        return sum(d[w] for d, w in zip(drops, plan.widths, strict=True))

    best = make_plan(net, x, "50%", "static", allocation="sensitivity", sensitivity=found)
    others = [make_plan(net, x, "50%", "static", allocation=name) for name in ("uniform", "importance")]
    assert predicted(best) <= min(map(predicted, others)) + 1e-9


class Killed(BaseException):
    """As if the process ended."""


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(tmp_path):
    net, seen = chain(), []

    def score(net: nn.Module) -> float:
        if len(seen) == 3:
            raise Killed
        seen.append(widths(net))
        return first_matters(net)

    with pytest.raises(Killed):
        measure(net, X, score, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert list(json.loads(file.read_text())["scores"]) == ["original", "0 @ 12", "0 @ 8"]
    seen.clear()
    rest = []
    found = measure(net, X, lambda net: rest.append(widths(net)) or first_matters(net), cache=tmp_path)
    assert rest == [(4, 16), (16, 12), (16, 8), (16, 4)]
    assert found == measure(net, X, first_matters)
    assert found == measure(net, X, lambda net: pytest.fail("measured again"), cache=tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_a_map_belongs_to_network_weights_score_and_ranking(tmp_path):
    net = chain()
    measure(net, X, first_matters, cache=tmp_path, name="a")
    measure(net, X, first_matters, cache=tmp_path, name="b")
    batches = [(torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64))]
    measure(net, X, first_matters, cache=tmp_path, name="a", importance="taylor", batches=batches)
    net[0].weight.data += 1
    measure(net, X, first_matters, cache=tmp_path, name="a")
    measure(chain(8), X, first_matters, cache=tmp_path, name="a")
    assert len(list(tmp_path.iterdir())) == 5


def test_progress_is_told():
    told: list[tuple[int, int, str]] = []
    measure(chain(), X, first_matters, shares=[0.5], progress=lambda *state: told.append(state))
    assert told == [(0, 3, "original"), (1, 3, "0 @ 8"), (2, 3, "1 @ 8"), (3, 3, "")]


def test_a_damaged_map_is_named(tmp_path: Path):
    measure(chain(), X, first_matters, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text('{"schema": 1}')
    with pytest.raises(PlanError, match=rf"{file.name}' can't be read .*delete it"):
        measure(chain(), X, first_matters, cache=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high", None])
def test_a_score_is_a_finite_number(value):
    with pytest.raises(PlanError, match=r"score 'acc' is .*; it must be a finite number"):
        measure(chain(), X, lambda net: value, name="acc")


@pytest.mark.parametrize("shares", [(), (0.0,), (1.0,), (0.5, 2)])
def test_shares_are_parts(shares):
    with pytest.raises(PlanError, match="give some between 0 and 1"):
        measure(chain(), X, first_matters, shares=shares)


def test_what_does_not_go_together():
    net = chain()
    found = measure(net, X, first_matters)
    with pytest.raises(PlanError, match=r"'sensitivity' is given without a sensitivity map"):
        make_plan(net, X, "50%", "static", allocation="sensitivity")
    with pytest.raises(PlanError, match=r"'uniform' is given with a sensitivity map"):
        make_plan(net, X, "50%", "static", sensitivity=found)
    with pytest.raises(PlanError, match=r"the sensitivity map is of network \w+, this one is \w+; measure it"):
        make_plan(chain(8), X, "50%", "static", allocation="sensitivity", sensitivity=found)
    with pytest.raises(PlanError, match="converted already"):
        measure(convert(net, make_plan(net, X, "50%", "static")), X, first_matters)
