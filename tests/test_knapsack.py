from __future__ import annotations

import itertools

import numpy as np
import pytest

from dyncompress.allocation import affordable, by_importance, near, uniform
from dyncompress.knapsack import allocate
from dyncompress.marginal import Expansion


class Chain:
    """Layers in a row: 3 -> a -> b -> c ... costs 3a + ab + bc ..."""

    def exact(self, keep):
        return sum(a * b for a, b in itertools.pairwise([3, *keep]))

    def expand(self, keep):
        groups = len(keep)
        curvature = np.zeros((groups, groups))
        for g in range(groups - 1):
            curvature[g, g + 1] = curvature[g + 1, g] = 1
        first = np.array([3.0] + [0.0] * (groups - 1))
        return Expansion(self.exact(keep), first + curvature @ np.array(keep, float), curvature)


class Sum:
    """Every channel costs the same: parameters of depthwise layers, say."""

    def exact(self, keep):
        return sum(keep)

    def expand(self, keep):
        return Expansion(sum(keep), np.ones(len(keep)), np.zeros((len(keep), len(keep))))


CHANNELS, FLOORS = [64, 128, 64], [8, 8, 8]


def solve(costs, targets, kind="uniform", channels=CHANNELS, floors=FLOORS):
    scores = [np.random.default_rng(i).random(c) for i, c in enumerate(channels)]
    ideal = uniform(channels, floors) if kind == "uniform" else by_importance(scores, floors)
    losses = near(affordable(ideal, costs, targets), channels, [1] * len(channels))
    return allocate(costs, targets, losses, floors, 0.01)


@pytest.mark.parametrize("target", [0.2, 0.25, 0.33, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "importance"])
def test_lands_within_one_percent_from_below(target, kind):
    goal = target * Chain().exact(CHANNELS)
    keep = solve([Chain()], [goal], kind)
    assert 0.99 * goal <= Chain().exact(keep) <= goal
    assert all(f <= k <= c for f, k, c in zip(FLOORS, keep, CHANNELS, strict=True))


def test_widths_that_fit_exactly_stay_aligned():
    assert solve([Chain()], [Chain().exact([32, 64, 32])]) == [32, 64, 32]


def test_where_nothing_lands_the_nearest_below_is_returned():
    # costs 3, 6, 9, 12: 11 lies between the third and the fourth
    assert solve([Chain()], [11], channels=[4], floors=[1]) == [3]


def test_nothing_to_choose():
    assert allocate([Chain()], [100], [], [], 0.01) == []


@pytest.mark.parametrize("seed", range(12))
def test_as_near_as_any_combination_of_widths(seed):
    """Three small groups: every combination can be looked at."""
    draw = np.random.default_rng(seed)
    channels = [int(c) for c in draw.integers(3, 14, 3)]
    floors = [max(1, c // 4) for c in channels]
    goal = draw.uniform(1.05 * Chain().exact(floors), Chain().exact(channels))
    costs = [Chain().exact(w) for w in itertools.product(*map(range, floors, [c + 1 for c in channels]))]
    found = Chain().exact(solve([Chain()], [goal], channels=channels, floors=floors))
    nearest = max(c for c in costs if c <= goal)
    assert found == nearest or (nearest >= 0.99 * goal and 0.99 * goal <= found <= goal)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shares", [(0.3, 0.9), (0.9, 0.3), (0.4, 0.62), (0.5, 0.5)])
def test_several_limits_hold_at_once_and_one_binds(seed, shares):
    channels = [int(c) for c in np.random.default_rng(seed).integers(24, 200, 8)]
    costs = [Chain(), Sum()]
    targets = [share * cost.exact(channels) for share, cost in zip(shares, costs, strict=True)]
    keep = solve(costs, targets, channels=channels, floors=[6] * 8)
    loads = [cost.exact(keep) / target for cost, target in zip(costs, targets, strict=True)]
    assert 0.99 <= max(loads) <= 1


def test_cheapest_losses_go_first():
    # A channel costs 1 wherever it is. Those of the first group lose nothing, those of the second 1 each.
    losses = [np.zeros(11), np.arange(10, -1, -1.0)]
    assert allocate([Sum()], [12], losses, [1, 1], 0.01) == [2, 10]


def test_a_cliff_behind_a_plateau_is_seen():
    # Halving the first group loses 1 at once and nothing more; each channel of the second loses 0.3: for 5 channels
    # the plateau is the better bargain, though its first step is the dearer one.
    losses = [np.array([9, 1, 1, 1, 1, 1, 0.0]), np.array([9, 1.5, 1.2, 0.9, 0.6, 0.3, 0.0])]
    assert allocate([Sum()], [7], losses, [1, 1], 0.01) == [1, 6]


@pytest.mark.parametrize("seed", range(8))
def test_the_least_loss_among_all_that_land(seed):
    """Every further channel lost costs more than the one before, as measured drops do."""
    draw = np.random.default_rng(seed)
    channels = [6, 7, 8]
    losses = [np.cumsum([0, *np.sort(draw.random(c))])[::-1] for c in channels]
    goal = int(draw.integers(9, 19))
    keep = allocate([Sum()], [goal], losses, [1, 1, 1], 0.01)
    every = [w for w in itertools.product(*(range(1, c + 1) for c in channels)) if sum(w) == goal]

    def lost(w):
        return sum(loss[k] for loss, k in zip(losses, w, strict=True))

    assert sum(keep) == goal
    assert lost(keep) == pytest.approx(min(map(lost, every)))


def test_more_budget_never_buys_a_cheaper_network():
    whole = Chain().exact(CHANNELS)
    found = [Chain().exact(solve([Chain()], [share * whole])) for share in np.arange(0.2, 1.001, 0.02)]
    assert found == sorted(found)
