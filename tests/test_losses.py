"""Every loss against its paper's formula, written out sample by sample in numpy and float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from dyncompress.errors import DistillationError
from dyncompress.losses import (
    attention_loss,
    blended,
    channel_loss,
    decoupled_loss,
    hint_loss,
    logit_loss,
    relation_loss,
    squared_loss,
)

SHAPES = [(5, 7), (2, 4, 3, 6), (2, 4, 9)]


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind(0)
    return student, teacher


def samples(scores: Tensor) -> list[np.ndarray]:
    """The class scores of every position of every image."""
    return list(np.moveaxis(scores.numpy(), 1, -1).reshape(-1, scores.shape[1]))


def softmax(scores: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(scores) / np.exp(scores).sum())


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))


# ---- logits ------------------------------------------------------------------------------------------------------


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 sum p (log p - log q), averaged over rows of classes, in numpy and float64."""
    s, t = (
        np.moveaxis(x.numpy().astype(np.float64), 1, -1).reshape(-1, x.shape[1]) / temperature
        for x in (student, teacher)
    )
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (t, s))
    return float((p * (np.log(p) - np.log(q))).sum(axis=1).mean() * temperature**2)


@pytest.mark.parametrize("shape", SHAPES)
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


# ---- relations ---------------------------------------------------------------------------------------------------


def relations_by_hand(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> float:
    """1 - np.corrcoef of every row and of every column of the two softmaxes."""
    q, p = (np.stack([softmax(row / temperature) for row in samples(x)]) for x in (student, teacher))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return float(temperature**2 * (inter + beta * intra))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 1.0), (4.0, 0.5)])
def test_relation_loss_is_the_two_correlations(shape: tuple[int, ...], temperature: float, beta: float) -> None:
    student, teacher = drawn(shape)
    found = relation_loss(student, teacher, temperature, beta).item()
    assert found == pytest.approx(relations_by_hand(student, teacher, temperature, beta), rel=1e-6)


def test_relations_do_not_see_scale_and_shift_of_probabilities() -> None:
    teacher = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.4, 0.4]], dtype=torch.float64)
    student = 0.5 * teacher + 1 / 6  # flatter, and still a distribution: [0.467, 0.317, 0.217], ...
    assert relation_loss(student.log(), teacher.log(), 1.0).item() == pytest.approx(0, abs=1e-12)
    assert logit_loss(student.log(), teacher.log(), 1.0).item() > 0.03


def test_relations_of_a_single_sample_are_those_of_its_classes() -> None:
    # [0.5, 0.3, 0.2] and [0.2, 0.3, 0.5]: deviations from 1/3 are (5, -1, -4) / 30 and (-4, -1, 5) / 30, so that
    # rho = (-20 + 1 - 20) / (25 + 1 + 16) = -39 / 42.
    p, q = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]))
    assert relation_loss(q, p, 1.0, beta=100.0).item() == pytest.approx(1 + 39 / 42)


# ---- decoupled ---------------------------------------------------------------------------------------------------


def decoupled_by_hand(student: Tensor, teacher: Tensor, temperature: float, beta: float, targets: list[int]) -> float:
    """Target against the rest, and the rest among themselves, for every sample whose target is a class."""
    found = []
    for s, t, target in zip(samples(student / temperature), samples(teacher / temperature), targets, strict=True):
        if not 0 <= target < len(s):
            continue
        p, q = softmax(t), softmax(s)
        binary = kl(np.array([p[target], 1 - p[target]]), np.array([q[target], 1 - q[target]]))
        found.append(binary + beta * kl(softmax(np.delete(t, target)), softmax(np.delete(s, target))))
    return float(np.mean(found) * temperature**2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 8.0), (4.0, 0.5)])
def test_decoupled_loss_is_the_two_divergences(shape: tuple[int, ...], temperature: float, beta: float) -> None:
    student, teacher = drawn(shape)
    labels = torch.randint(shape[1], shape[:1] + shape[2:], generator=torch.Generator().manual_seed(1))
    for given, targets in ((labels, labels.flatten()), (None, teacher.argmax(dim=1).flatten())):
        expected = decoupled_by_hand(student, teacher, temperature, beta, targets.tolist())
        assert decoupled_loss(student, teacher, temperature, beta, given).item() == pytest.approx(expected, rel=1e-10)


def test_the_teachers_own_certainty_as_beta_gives_the_logit_loss() -> None:
    """KL(p || q) = KL(b_p || b_q) + (1 - p_target) KL(p' || q'): the paper's equation 6."""
    student, teacher = drawn((1, 7))
    rest = 1 - teacher.softmax(dim=1).max().item()
    assert decoupled_loss(student, teacher, 1.0, beta=rest).item() == pytest.approx(
        logit_loss(student, teacher, 1.0).item()
    )


def test_positions_without_a_class_are_left_out() -> None:
    student, teacher = drawn((2, 4, 3))
    labels = torch.tensor([[0, 255, 2], [-100, 3, 1]], dtype=torch.int32)
    found = decoupled_loss(student, teacher, 2.0, 8.0, labels).item()
    assert found == pytest.approx(decoupled_by_hand(student, teacher, 2.0, 8.0, labels.flatten().tolist()))
    student.requires_grad_()
    none = decoupled_loss(student, teacher, 2.0, 8.0, torch.full((2, 3), 255, dtype=torch.uint8))
    none.backward()
    assert none.item() == 0 and student.grad is not None and student.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"labels torch\.int64 of shape \(3,\) name no class for each of \(5,\)"),
        (torch.zeros(5, 7), r"labels torch\.float32 of shape \(5, 7\)"),  # mixed classes
        (torch.zeros(5), r"labels torch\.float32"),
        (torch.zeros(5, dtype=torch.bool), r"labels torch\.bool"),
    ],
)
def test_labels_that_name_no_class_per_sample_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        decoupled_loss(*drawn((5, 7)), 4.0, 8.0, labels)


# ---- dense and regression ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_channel_loss_is_the_divergence_over_positions(shape: tuple[int, ...]) -> None:
    student, teacher = drawn(shape)
    found = [
        kl(softmax(t.ravel() / 3.0), softmax(s.ravel() / 3.0))
        for image in zip(student.numpy(), teacher.numpy(), strict=True)
        for s, t in zip(*image, strict=True)
    ]
    assert len(found) == shape[0] * shape[1]
    assert channel_loss(student, teacher, 3.0).item() == pytest.approx(9 * np.mean(found))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1, 1)])
def test_channels_without_positions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DistillationError, match="have no positions to compare"):
        channel_loss(*drawn(shape), 4.0)


def test_squared_loss_by_hand() -> None:
    assert squared_loss(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)).item() == pytest.approx(5)  # (1 + 9) / 2


# ---- hints -------------------------------------------------------------------------------------------------------


def test_hint_loss_is_a_share_of_the_teachers_power() -> None:
    teacher = torch.tensor([[[3.0, 1.0]], [[0.0, 0.0]]])
    student = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])
    assert hint_loss(student, teacher).item() == pytest.approx((4 + 1) / (9 + 1))
    assert hint_loss(0 * teacher, teacher).item() == pytest.approx(1)
    assert hint_loss(1e3 * student, 1e3 * teacher).item() == pytest.approx(0.5)
    assert hint_loss(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0


def test_hints_of_other_shapes_are_refused() -> None:
    with pytest.raises(DistillationError, match=r"\(1, 2\) of the student and \(1, 3\) of the teacher's kept"):
        hint_loss(torch.zeros(1, 2), torch.zeros(1, 3))


# ---- several teachers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_blended_scores_give_the_mean_of_the_softmaxes(shape: tuple[int, ...]) -> None:
    votes = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    mean = torch.stack([(v / 4).softmax(dim=1) for v in votes]).mean(dim=0)
    assert torch.allclose((blended(votes, 4.0, "classes") / 4).softmax(dim=1), mean)
    assert torch.allclose(blended(votes, 4.0, ""), torch.stack(votes).mean(dim=0))
    assert blended(votes[:1], 4.0, "classes") is votes[0]
    if len(shape) > 2:
        where = torch.stack([(v / 4).flatten(2).softmax(dim=2) for v in votes]).mean(dim=0)
        found = blended(votes, 4.0, "positions")
        assert found.shape == shape
        assert torch.allclose((found / 4).flatten(2).softmax(dim=2), where)


# ---- all of them -------------------------------------------------------------------------------------------------

OF_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logits": partial(logit_loss, temperature=4.0),
    "dist": partial(relation_loss, temperature=4.0),
    "dkd": partial(decoupled_loss, temperature=4.0),
}
ALL = {**OF_SCORES, "channels": partial(channel_loss, temperature=4.0), "mse": squared_loss,
       "attention": attention_loss, "hint": hint_loss}  # fmt: skip


@pytest.mark.parametrize("output", [torch.zeros(4, 1), torch.zeros(4), torch.zeros(4, 1, 2, 2)])
def test_a_softmax_over_one_class_is_refused(output: Tensor) -> None:
    for loss in OF_SCORES.values():
        with pytest.raises(DistillationError, match="kind='mse'"):
            loss(output, output)


@pytest.mark.parametrize("name", ALL)
def test_16_bits_are_compared_in_32_and_gradients_stay_finite(name: str) -> None:
    """Also under autocast, and also where a network is as sure of a class as its numbers allow."""
    for scale in (1.0, 1e4):
        student, teacher = (scale * x.to(torch.bfloat16) for x in drawn((4, 8, 3)))
        expected = ALL[name](student.double(), teacher.double())
        student.requires_grad_()
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = ALL[name](student, teacher)
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
            (gradient,) = torch.autograd.grad(loss, student)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_a_student_that_follows_the_gradient_comes_closer(name: str) -> None:
    student, teacher = drawn((4, 8, 3), seed=3)
    student.requires_grad_()
    before = ALL[name](student, teacher)
    (gradient,) = torch.autograd.grad(before, student)
    with torch.no_grad():
        after = ALL[name](student - 1e-3 * gradient / gradient.norm(), teacher)
    # A step of length 1e-3 against the gradient lowers the loss by 1e-3 |gradient|, to first order.
    assert (before - after).item() == pytest.approx(1e-3 * gradient.norm().item(), rel=1e-2)
