"""Which tensors of two answers belong together, and what modules return on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dyncompress.answers import check_features, paired_outputs, recorded
from dyncompress.errors import DistillationError

A, B = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (A, B, 1),
        ({"logits": A, "hidden": torch.zeros(2, 9)}, {"logits": B, "hidden": torch.zeros(2, 5)}, 1),
        ({"out": A, "aux": A}, {"out": B}, 1),
        ({"a": A, "b": A}, {"a": B, "b": B}, 2),
        ((A, A), [B, B], 2),
        ((A, A), B, 1),  # auxiliary heads while training
        (A, (B,), 1),
        ((A, None, torch.ones(3, dtype=torch.long)), (B, None, torch.ones(4, dtype=torch.long)), 1),
        ({"heads": [A, A]}, {"heads": [B, B]}, 2),
    ],
)
def test_tensors_that_belong_together_are_found(student: Any, teacher: Any, pairs: int) -> None:
    found = paired_outputs(student, teacher)
    assert len(found) == pairs
    assert all(s is A and t is B for s, t in found.values())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (A, torch.zeros(2, 5), r"output \(2, 5\), the student output \(2, 3\)"),
        ((A, A), (B, B, B), r"output\[2\] \(2, 3\), the student output\[0\]"),
        ({"a": A, "b": A}, {"a": B, "c": B}, r"output\['c'\]"),
        ("text", A, "the student answers with a str"),
        (A, torch.zeros(2, dtype=torch.long), "the teacher answers with a Tensor"),
        (torch.zeros(()), torch.zeros(()), "the student answers with a Tensor"),
    ],
)
def test_other_outputs_are_refused_by_name_and_shape(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        paired_outputs(student, teacher)


def test_named_outputs_are_taken_from_beside_the_main_one() -> None:
    student, teacher = {"out": B, "aux": A, "depth": [B, A]}, {"out": A, "aux": B, "depth": (A, B)}
    found = paired_outputs(student, teacher, ["output['depth'][1]", "output['aux']"])
    assert list(found) == ["output['depth'][1]", "output['aux']"]
    assert all(s is A and t is B for s, t in found.values())


def test_an_output_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(DistillationError, match=r"the student has no output aux; it answers output\['out'\] \(2, 3\)"):
        paired_outputs({"out": A}, {"out": B}, ["aux"])
    with pytest.raises(DistillationError, match=r"the teacher has no output output\['aux'\]; it answers output"):
        paired_outputs({"out": A, "aux": A}, B, ["output['aux']"])


# ---- features ----------------------------------------------------------------------------------------------------


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)))


def test_features_are_recorded_for_a_while() -> None:
    net, x = stack(), torch.randn(1, 3, 5, 5)
    with recorded(net, ["0", "1.0"]) as seen:
        net(x)
    assert torch.equal(seen["0"], net[0](x))
    assert seen["1.0"].shape == (1, 4, 3, 3)
    assert not any(m._forward_hooks for m in net.modules())


def test_a_feature_that_does_not_exist_is_answered_with_the_nearest() -> None:
    check_features(stack(), ["1.0"])
    with pytest.raises(DistillationError, match=r"'1\.00', which Sequential does not have; near: 1\.0"):
        check_features(stack(), ["1.00"])
