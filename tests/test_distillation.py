"""Losses against values made by hand or by an independent formula, and every refusal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyncompress.distillation import (
    DistillConfig,
    Teacher,
    attention_loss,
    check_features,
    features_loss,
    fingerprint,
    logit_loss,
    output_loss,
    paired_outputs,
    recorded,
)
from dyncompress.errors import DistillationError


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 sum p (log p - log q), averaged over rows of classes, in numpy and float64."""
    s, t = (
        np.moveaxis(x.numpy().astype(np.float64), 1, -1).reshape(-1, x.shape[1]) / temperature
        for x in (student, teacher)
    )
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (t, s))
    return float((p * (np.log(p) - np.log(q))).sum(axis=1).mean() * temperature**2)


@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 3, 6), (2, 4, 9)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logit_loss_is_the_divergence_per_position(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    loss = logit_loss(student, teacher, temperature)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(kl_by_hand(student, teacher, temperature), rel=1e-12)


def test_logit_loss_of_two_classes_by_hand() -> None:
    # Teacher 1/4, 3/4; student 1/2, 1/2: 1/4 log 1/2 + 3/4 log 3/2.
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert logit_loss(student, teacher, 1.0).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_temperature_keeps_the_gradient_finite_in_size() -> None:
    """For large T the gradient tends to (student - teacher) / (C * rows), whatever T is: the reason for T^2."""
    student = torch.randn(1, 10, dtype=torch.float64)
    teacher = torch.randn(1, 10, dtype=torch.float64)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(logit_loss(student, teacher, 1000.0), student)
    assert torch.allclose(gradient, (student - teacher) / 10, atol=1e-3)


def test_half_precision_outputs_are_compared_in_single() -> None:
    student, teacher = torch.randn(2, 4, 8).bfloat16().unbind(0)
    loss = logit_loss(student, teacher, 4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(kl_by_hand(student.float(), teacher.float(), 4.0), rel=1e-5)


def test_attention_loss_is_the_squared_distance_of_unit_maps() -> None:
    student = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    teacher = torch.randn(3, 8, 5, 6, dtype=torch.float64)  # wider: channels need not agree
    maps = [(f.numpy() ** 2).sum(axis=1).reshape(3, -1) for f in (student, teacher)]  # a sum: the mean's factor cancels
    a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
    assert attention_loss(student, teacher).item() == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), rel=1e-12)


def test_attention_on_different_pixels_is_two() -> None:
    # Unit maps (1, 0) and (0, 1): squared distance 2. Equal maps of any size: 0.
    left, right = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, -5.0]]])
    assert attention_loss(left, right).item() == pytest.approx(2)
    assert attention_loss(left, 7 * left).item() == pytest.approx(0)


def test_kinds_and_pairs_are_averaged() -> None:
    s, t = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]])
    assert output_loss(s, t, DistillConfig(kind="mse")).item() == pytest.approx(5)  # (1 + 9) / 2
    assert output_loss([s, s], [t, s], DistillConfig(kind="mse")).item() == pytest.approx(2.5)


# ---- what a network answers --------------------------------------------------------------------------------------

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
    assert all(s is A and t is B for s, t in found)


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


@pytest.mark.parametrize("output", [torch.zeros(4, 1), torch.zeros(4), torch.zeros(4, 1, 2, 2)])
def test_a_softmax_over_one_class_is_refused(output: Tensor) -> None:
    with pytest.raises(DistillationError, match="kind='mse'"):
        logit_loss(output, output, 4.0)


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


def test_features_add_up_by_weight() -> None:
    s, t = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64).unbind(0)
    loss = features_loss({"a": s, "b": t}, {"a": t, "b": t}, {"a": 3.0, "b": 5.0})
    assert loss.item() == pytest.approx(3 * attention_loss(s, t).item())  # b is equal in both


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({}, {"a": A}, "the student's 'a' returned nothing: it did not run"),
        ({"a": (A,)}, {"a": A}, "the student's 'a' returned tuple"),
        ({"a": torch.zeros(2, 4, 3, 3)}, {"a": torch.zeros(2, 4, 5, 5)}, r"\(2, 4, 3, 3\) .* \(2, 4, 5, 5\)"),
        ({"a": A}, {"a": A}, "takes .B, C, "),
    ],
)
def test_features_that_cannot_be_compared_are_refused(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        features_loss(student, teacher, {"a": 1.0})


def test_a_feature_that_does_not_exist_is_answered_with_the_nearest() -> None:
    check_features(stack(), ["1.0"])
    with pytest.raises(DistillationError, match=r"'1\.00', which Sequential does not have; near: 1\.0"):
        check_features(stack(), ["1.00"])


# ---- the teacher -------------------------------------------------------------------------------------------------


def test_the_teacher_is_frozen_and_answers_without_a_graph() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    teacher = Teacher(net.train())
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    answer, features = teacher.answer((x,), {}, ["0"])
    assert not answer.requires_grad
    assert features["0"].shape == (2, 4, 3, 3)
    assert torch.equal(answer, teacher.answer((x,), {})[0])  # no dropout, no statistics
    assert net[1].num_batches_tracked == 0
    teacher.follow(torch.device("cpu"), torch.float64)
    assert teacher.answer((x.double(),), {})[0].dtype == torch.float64


def test_a_fingerprint_tells_weights_apart_and_nothing_else() -> None:
    first, second = stack(), stack()
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second.eval().requires_grad_(False))
    with torch.no_grad():
        second[0].bias[0] += 1e-6
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(nn.BatchNorm1d(2)) != fingerprint(nn.BatchNorm1d(3))
    assert fingerprint(first.bfloat16()) == fingerprint(first)  # every dtype has bytes


# ---- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -1}, "alpha -1 is not a number from 0 on"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"alpha": "1"}, "alpha '1'"),
        ({"alpha": True}, "alpha True"),
        ({"temperature": 0}, "temperature 0 is not a positive number"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"kind": "logit"}, "kind 'logit' is unknown; choose one of logits, mse"),
        ({"features": ["layer1"]}, "features .'layer1'. is no mapping"),
        ({"features": {"layer1": 0}}, r"features\['layer1'\] is 0"),
    ],
)
def test_config_refuses_by_name_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        DistillConfig(**values)


def test_alpha_zero_is_a_control_and_allowed() -> None:
    assert DistillConfig(alpha=0).alpha == 0
