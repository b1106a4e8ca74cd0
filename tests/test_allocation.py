from __future__ import annotations

import numpy as np
import pytest

from dyncompress.allocation import affordable, aligned, by_importance, near, uniform
from dyncompress.marginal import Expansion


def test_aligned_widths():
    assert aligned(100, 8) == [8, 16, 24, 32, 48, 64, 80, 96, 100]
    assert aligned(10, 2) == [2, 8, 10]
    assert aligned(8, 2, each=8) == [2, 3, 4, 6, 8]  # layers of 16, 24, 32, 48 and 64 channels


def test_one_threshold_for_all_groups():
    scores = [np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.5, 0.4, 0.3, 0.2])]
    assert by_importance(scores, [1, 1])(0.5) == [4, 1]


class Channels:
    """Every channel costs one."""

    def exact(self, keep):
        return sum(keep)

    def expand(self, keep):
        return Expansion(sum(keep), np.ones(len(keep)), np.zeros((len(keep), len(keep))))


@pytest.mark.parametrize(
    ("targets", "widths"), [([48], [16, 32]), ([96], [32, 64]), ([1000], [32, 64]), ([72, 24], [8, 16])]
)
def test_the_widest_ratio_that_exceeds_no_target(targets, widths):
    assert affordable(uniform([32, 64], [4, 4]), [Channels()] * len(targets), targets) == widths


def test_what_a_width_loses_by_hand():
    (loss,) = near([20], [40], [1])
    # (distance / 40)^2, and (1/6)^2 where the width is none of 8, 16, 24, 32 or 40
    assert loss[[16, 20, 24, 40]] == pytest.approx([0.01, 1 / 36, 0.01, 0.25])
    assert loss[21] == pytest.approx(1 / 36 + (1 / 40) ** 2)
