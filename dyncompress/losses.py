"""How far a student is from its teacher. Pure functions of tensors, which compute in fp32 at least.

With ``p`` the teacher's and ``q`` the student's softmax over classes at temperature ``T``:

=========  ====================================================================  =================================
logits     ``T^2 KL(p || q)``                                                    Hinton 2015, arXiv 1503.02531
dist       ``T^2 [(1 - mean rho(q_i, p_i)) + beta (1 - mean rho(q_:j, p_:j))]``  Huang 2022, arXiv 2205.10536
dkd        ``T^2 [KL(b_p || b_q) + beta KL(p' || q')]``                          Zhao 2022, arXiv 2203.08679
channels   ``T^2 mean over channels of KL(P || Q)``, softmax over positions      Shu 2021, arXiv 2011.13256
mse        ``mean (s - t)^2``
attention  ``||a(t) - a(s)||^2``, ``a`` the unit map of the mean ``F^2``         Zagoruyko 2017, arXiv 1612.03928
hint       ``mean (s - t)^2 / mean t^2``                                         Romero 2015, arXiv 1412.6550
=========  ====================================================================  =================================

Where a loss has positions (pixels), each position of each image is a sample. What differs from a paper, and why, is
told at the function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncompress.errors import DistillationError

_FAINT = 1e-8  # the norm of a constant vector, whose correlation is then 0
_SILENT = 1e-6  # the power of features that are all zero


# ---- of outputs --------------------------------------------------------------------------------------------------


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` of the softened class distributions.

    Args:
        student: [B, C, *positions], class scores; a position is a pixel of a dense prediction.
        teacher: The same shape.
        temperature: ``T``; the factor ``T^2`` keeps the gradients' size as ``T`` grows.

    Returns:
        Scalar: mean over images and positions, in nats.

    Raises:
        DistillationError: If there are fewer than two classes: a softmax over one is constant.

    Source:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, section 2.

    Example:
        >>> logit_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0986]]), temperature=1.0)
        tensor(0.1308)
    """
    student, teacher = _scores(student, teacher, temperature)
    return _divergence(F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1), 1).mean() * temperature**2


def relation_loss(student: Tensor, teacher: Tensor, temperature: float, beta: float = 1.0) -> Tensor:
    """DIST: how far the softened class distributions are from being linear functions of each other.

    ``T^2 * [(1 - mean_i rho(q_i, p_i)) + beta * (1 - mean_j rho(q_:j, p_:j))]``, ``rho`` Pearson's correlation: of a
    sample's classes, and of a class's samples in the batch. A student need not match scale and shift, which a small
    one can't. The second part sees the batch that the process has: not the other processes', nor accumulated ones.
    It is left out where there is one sample only.

    Args:
        student: [B, C, *positions], class scores.
        teacher: The same shape.
        temperature: ``T``.
        beta: Weight of the second part, relative to the first.

    Returns:
        Scalar in [0, ``2 T^2 (1 + beta)``].

    Raises:
        DistillationError: If there are fewer than two classes.

    Source:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, section 3. ``T^2`` as in the
        authors' code.

    Example:
        >>> scores = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
        >>> relation_loss(scores, scores, temperature=4.0).abs() < 1e-5
        tensor(True)
    """
    q, p = (_rows(scores.softmax(dim=1)) for scores in _scores(student, teacher, temperature))
    loss = 1 - _correlation(q, p, dim=1).mean()
    if len(q) > 1:
        loss = loss + beta * (1 - _correlation(q, p, dim=0).mean())
    return loss * temperature**2


def decoupled_loss(
    student: Tensor, teacher: Tensor, temperature: float, beta: float = 8.0, labels: Tensor | None = None
) -> Tensor:
    """DKD: the divergence of the target class against the rest, and that among the rest, each with a weight of its own.

    ``T^2 * [KL(b_p || b_q) + beta * KL(p' || q')]`` with ``b = (p_target, 1 - p_target)``, and ``p'`` the softmax over
    the classes other than the target. In `logit_loss` the second part has the weight ``1 - p_target`` of the teacher:
    the surer it is, the less is learned from how it ranks the others.

    Args:
        student: [B, C, *positions], class scores.
        teacher: The same shape.
        temperature: ``T``.
        beta: Weight of the second part, relative to the first.
        labels: [B, *positions], integers: the target classes. A position whose label is no class (255, -100) is left
            out. Without labels the target is the teacher's first choice.

    Returns:
        Scalar: mean over images and positions, in nats.

    Raises:
        DistillationError: If there are fewer than two classes, or the labels are of another kind or shape.

    Source:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, equation 7.

    Example:
        >>> decoupled_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0986]]), temperature=1.0)  # two classes: no rest
        tensor(0.1308)
    """
    shape = student.shape[:1] + student.shape[2:]
    student, teacher = (_rows(scores) for scores in _scores(student, teacher, temperature))
    if labels is None:
        target = teacher.argmax(dim=1)
    else:
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != shape:
            raise DistillationError(
                f"labels {labels.dtype} of shape {tuple(labels.shape)} name no class for each of {tuple(shape)}; point"
                " DistillConfig(labels=) to whole numbers of that shape, or leave it out: the teacher's first choice is"
                " the target then"
            )
        target = labels.reshape(-1).to(student.device, torch.int64)
    classes = student.shape[1]
    known = (target >= 0) & (target < classes)
    target = torch.where(known, target, 0)[:, None]
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter(1, target, True)

    def parts(scores: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of target and rest [N, 2], and within the rest [N, C], 0 at the target."""
        rest = scores.masked_fill(is_target, -math.inf)
        both = torch.cat([scores.gather(1, target), rest.logsumexp(dim=1, keepdim=True)], dim=1)
        return both.log_softmax(dim=1), rest.log_softmax(dim=1).masked_fill(is_target, 0)

    (ours, our_rest), (theirs, their_rest) = parts(student), parts(teacher)
    among_rest = (their_rest.exp() * (their_rest - our_rest)).sum(dim=1)  # the target's term is 1 * (0 - 0)
    losses = (_divergence(theirs, ours, 1) + beta * among_rest) * known
    return losses.sum() / known.sum().clamp_min(1) * temperature**2


def channel_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Channel-wise distillation of a dense prediction: where in the image each class is seen.

    ``T^2 * KL(P || Q)`` with the softmax of a channel over the positions, mean over channels and images.

    Args:
        student: [B, C, *positions].
        teacher: The same shape.
        temperature: ``T``.

    Raises:
        DistillationError: If there are fewer than two positions.

    Source:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, section 3.

    Example:
        >>> channel_loss(torch.zeros(1, 1, 2), torch.tensor([[[0.0, 1.0986]]]), temperature=1.0)
        tensor(0.1308)
    """
    if student.dim() < 3 or student[0, 0].numel() < 2:
        raise DistillationError(
            f"outputs of shape {tuple(student.shape)} have no positions to compare in a channel; kind 'channels' is for"
            " dense predictions [B, C, *positions], use 'logits', 'dist' or 'dkd' here"
        )
    ours, theirs = (F.log_softmax(_precise(x).flatten(2) / temperature, dim=2) for x in (student, teacher))
    return _divergence(theirs, ours, 2).mean() * temperature**2


def squared_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, for regression.

    Example:
        >>> squared_loss(torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor(5.)
    """
    return (_precise(student) - _precise(teacher)).square().mean()


def blended(teachers: Sequence[Tensor], temperature: float, dims: str) -> Tensor:
    """Scores whose softmax at this temperature is the mean of the teachers' softmaxes; their mean where there is none.

    Args:
        teachers: Outputs of one shape [B, C, *positions].
        temperature: ``T``.
        dims: What the softmax runs over: ``"classes"``, ``"positions"``, or ``""`` for none.

    Example:
        >>> blended([torch.tensor([[0.0, 1.0986]]), torch.tensor([[1.0986, 0.0]])], 1.0, "classes").softmax(1)
        tensor([[0.5000, 0.5000]])
    """
    if len(teachers) == 1:
        return teachers[0]
    precise = [_precise(t) for t in teachers]
    if not dims:
        return torch.stack(precise).mean(dim=0)
    dim = 1 if dims == "classes" else 2
    shaped = [t if dims == "classes" else t.flatten(2) for t in precise]
    logs = torch.stack([F.log_softmax(t / temperature, dim=dim) for t in shaped])
    return (logs.logsumexp(dim=0) * temperature).view_as(teachers[0])  # a common factor, 1 / n, does not show


# ---- of features -------------------------------------------------------------------------------------------------


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the two unit attention maps: where, not in which channels, something is seen.

    Channels may differ, so a narrower student needs no adapter.

    Args:
        student: [B, C, *positions].
        teacher: [B, C', *positions]; its channels may differ.

    Returns:
        Scalar in [0, 2]: mean over images.

    Raises:
        DistillationError: If batch or positions differ, or there are no positions.

    Source:
        Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, equation 2, which takes the norm and not
        its square, and weighs it with beta / 2.
    """
    if student.dim() < 3 or student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise DistillationError(
            f"features {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher can't be"
            " compared; attention transfer takes [B, C, *positions] with equal batch and positions: name other modules"
        )
    a, b = (F.normalize(_precise(f).square().mean(dim=1).flatten(1), dim=1) for f in (student, teacher))
    return (a - b).square().sum(dim=1).mean()


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of features, as a share of the teacher's power: 0 for equal ones, 1 for a student that is silent.

    The teacher's features are those of the channels that the student kept, so the two compare directly; FitNets
    needs a regressor to bring the student to the teacher's width, and does not divide by the power, which lets one
    weight mean the same in every layer.

    Args:
        student: [B, C, ...].
        teacher: The same shape.

    Raises:
        DistillationError: If the shapes differ.

    Source:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, equation 3.

    Example:
        >>> hint_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))  # 1 / 4
        tensor(0.2500)
    """
    if student.shape != teacher.shape:
        raise DistillationError(
            f"features {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher's kept channels"
            " can't be compared; name a module that returns one value for each channel in both networks"
        )
    student, teacher = _precise(student), _precise(teacher)
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(_SILENT)


# ---- parts -------------------------------------------------------------------------------------------------------


def _precise(tensor: Tensor) -> Tensor:
    """fp32 at least: a softmax or a square in 16 bits loses what it should compare."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scores(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both divided by the temperature."""
    if student.dim() < 2 or student.shape[1] < 2:
        raise DistillationError(
            f"outputs of shape {tuple(student.shape)} have no classes in dimension 1, and a softmax over less than two"
            " teaches nothing; use DistillConfig(kind='mse')"
        )
    return _precise(student) / temperature, _precise(teacher) / temperature


def _rows(scores: Tensor) -> Tensor:
    """[B, C, *positions] -> [samples, C]."""
    return scores.movedim(1, -1).reshape(-1, scores.shape[1])


def _divergence(of: Tensor, against: Tensor, dim: int) -> Tensor:
    """``KL(of || against)`` of log-probabilities."""
    return F.kl_div(against, of, reduction="none", log_target=True).sum(dim=dim)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's, along a dimension; 0 where one of them is constant."""
    a, b = (F.normalize(x - x.mean(dim=dim, keepdim=True), dim=dim, eps=_FAINT) for x in (a, b))
    return (a * b).sum(dim=dim)
