from __future__ import annotations

import numpy as np
import pytest

from dyncompress.allocation import aligned, allocate, by_importance, uniform


def test_aligned_widths():
    assert aligned(100, 8, 16) == [8, 16, 24, 32, 48, 64, 80, 96, 100]
    assert aligned(10, 2, 4) == [2, 4, 8, 10]


def quadratic(keep):
    """Three layers in a row: 3 -> a -> b -> c."""
    a, b, c = keep
    return 3 * a + a * b + b * c


@pytest.mark.parametrize("target", [0.2, 0.25, 0.33, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", ["uniform", "importance"])
def test_lands_within_one_percent_from_below(target, kind):
    channels, floors = [64, 128, 64], [8, 8, 8]
    scores = [np.random.default_rng(i).random(c) for i, c in enumerate(channels)]
    ideal = uniform(channels, floors) if kind == "uniform" else by_importance(scores, floors)
    goal = target * quadratic(channels)
    keep = allocate(quadratic, ideal, channels, floors, goal, 0.01)
    assert 0.99 * goal <= quadratic(keep) <= goal
    assert all(f <= k <= c for f, k, c in zip(floors, keep, channels, strict=True))


def test_widths_that_fit_exactly_stay_aligned():
    channels = [64, 128, 64]
    goal = quadratic([32, 64, 32])
    assert allocate(quadratic, uniform(channels, [8] * 3), channels, [8] * 3, goal, 0.01) == [32, 64, 32]


def test_one_threshold_for_all_groups():
    scores = [np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.5, 0.4, 0.3, 0.2])]
    assert by_importance(scores, [1, 1])(0.5) == [4, 1]


def test_where_nothing_lands_the_nearest_below_is_returned():
    assert allocate(lambda k: 100 * k[0], uniform([4], [1]), [4], [1], 350, 0.01) == [3]
