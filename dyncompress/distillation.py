"""How a student learns from the network that it was made from. Plain torch: no trainer is involved.

Logits:    ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``
           Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531, section 2.
Attention: ``||a(teacher) - a(student)||^2`` with ``a(F) = v / ||v||``, ``v`` the channel mean of ``F^2``, flattened
           Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928, equation 2.
           It compares maps without channels, so a narrower student needs no adapter. Differs from the paper, which
           takes the norm and not its square, and weighs it with beta / 2.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncompress.errors import DistillationError, shown

KINDS = ("logits", "mse")
TEMPERATURES = (0.001, 10_000)
"""Beyond, logits over it or its square are no numbers in fp32, or tell nothing apart."""
_LARGEST = 1e30  # a weight; its product with a loss is a number in fp32


@dataclass(frozen=True)
class DistillConfig:
    """What is added to the user's own loss: ``alpha * output term + sum of weight * attention term``.

    Attributes:
        alpha: Weight of the output term; 0 leaves only the features.
        temperature: Softens both softmaxes (kind ``logits``).
        features: Modules of the network, by name, whose attention maps are transferred, with a weight each.
        kind: ``logits`` for class scores along dimension 1, ``mse`` (mean squared difference) for regression.

    Raises:
        DistillationError: If a value is out of its range.

    Example:
        >>> DistillConfig(alpha=0.5, features={"layer3": 10.0}).temperature
        4.0
    """

    alpha: float = 1.0
    temperature: float = 4.0
    features: dict[str, float] = field(default_factory=dict)
    kind: Literal["logits", "mse"] = "logits"

    def __post_init__(self) -> None:
        if not (_is_number(self.alpha) and self.alpha >= 0):
            raise DistillationError(
                f"alpha {shown(self.alpha)} is not a number from 0 on; 1.0 weighs both losses alike"
            )
        low, high = TEMPERATURES
        if not (_is_number(self.temperature) and low <= self.temperature <= high):
            raise DistillationError(
                f"temperature {shown(self.temperature)} is not a positive number from {low} to {high}; 1 to 10 is usual"
            )
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise DistillationError(f"kind {shown(self.kind)} is unknown; choose one of {', '.join(KINDS)}")
        if not isinstance(self.features, Mapping):
            raise DistillationError(
                f"features {shown(self.features)} is no mapping; give module names with a weight each, such as"
                " {'layer3': 10.0}"
            )
        for name, weight in self.features.items():
            if not isinstance(name, str):
                raise DistillationError(f"features names {shown(name)}; a name is the text of a module's path")
            if not (_is_number(weight) and weight > 0):
                raise DistillationError(f"features[{shown(name)}] is {shown(weight)}; a weight is a positive number")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


# ---- losses ------------------------------------------------------------------------------------------------------


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` of the softened class distributions.

    Args:
        student: [B, C, *positions], class scores; a position is a pixel of a dense prediction.
        teacher: The same shape.
        temperature: ``T``; the factor ``T^2`` keeps the gradients' size as ``T`` grows.

    Returns:
        Scalar: mean over images and positions, in nats. Computed in fp32 at least.

    Raises:
        DistillationError: If there are fewer than two classes: a softmax over one is constant.

    Example:
        >>> logit_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0986]]), temperature=1.0)
        tensor(0.1308)
    """
    if student.dim() < 2 or student.shape[1] < 2:
        raise DistillationError(
            f"outputs of shape {tuple(student.shape)} have no classes in dimension 1, and a softmax over less than two"
            " teaches nothing; use DistillConfig(kind='mse')"
        )
    student, teacher = _precise(student), _precise(teacher)
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the two unit attention maps.

    Args:
        student: [B, C, *positions].
        teacher: [B, C', *positions]; its channels may differ.

    Returns:
        Scalar in [0, 2]: mean over images.

    Raises:
        DistillationError: If batch or positions differ, or there are no positions.
    """
    if student.dim() < 3 or student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise DistillationError(
            f"features {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher can't be"
            " compared; attention transfer takes [B, C, *positions] with equal batch and positions: name other modules"
        )
    a, b = (F.normalize(_precise(f).square().mean(dim=1).flatten(1), dim=1) for f in (student, teacher))
    return (a - b).square().sum(dim=1).mean()


def output_loss(student: Any, teacher: Any, config: DistillConfig) -> Tensor:
    """The output term: mean of the loss over the pairs that `paired_outputs` finds."""
    pairs = paired_outputs(student, teacher)
    if config.kind == "mse":
        losses = [(_precise(s) - _precise(t)).square().mean() for s, t in pairs]
    else:
        losses = [logit_loss(s, t, config.temperature) for s, t in pairs]
    return torch.stack(losses).mean()


def _precise(tensor: Tensor) -> Tensor:
    """fp32 at least: a softmax or a square in 16 bits loses what it should compare."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---- what a network answers --------------------------------------------------------------------------------------


def paired_outputs(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two networks' answers that belong together.

    An answer is a tensor, a mapping (its ``logits`` or ``out`` where there is one, else every entry), or a sequence
    (every entry). Where one network gives one tensor and the other several (auxiliary heads that exist only while
    training), the first is taken.

    Raises:
        DistillationError: If the two answer differently; names both.
    """
    ours, theirs = (dict(answer_tensors(a)) for a in (student, teacher))
    if not ours or not theirs:
        which, answer = ("student", student) if not ours else ("teacher", teacher)
        raise DistillationError(
            f"the {which} answers with a {type(answer).__name__} without a floating-point tensor [B, ...]; distillation"
            " takes a tensor, or a dict, tuple or list of tensors: use distill=False for this network"
        )
    if 1 in (len(ours), len(theirs)):
        pairs = [(next(iter(ours.values())), next(iter(theirs.values())))]
    else:
        pairs = [(ours[key], theirs[key]) for key in ours if ours.keys() == theirs.keys()]
    if not pairs or any(s.shape != t.shape for s, t in pairs):
        raise DistillationError(
            f"the teacher answers {_shapes(theirs)}, the student {_shapes(ours)}; both must have the same outputs: pass"
            " a teacher of the same task"
        )
    return pairs


def answer_tensors(answer: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every floating-point [B, ...] in a network's answer that distillation looks at."""
    if isinstance(answer, Tensor):
        if answer.is_floating_point() and answer.dim():
            yield name, answer
    elif isinstance(answer, Mapping):
        main = next((key for key in ("logits", "out") if key in answer), None)
        for key in answer if main is None else [main]:
            yield from answer_tensors(answer[key], f"{name}[{key!r}]")
    elif isinstance(answer, (tuple, list)):
        for i, entry in enumerate(answer):
            yield from answer_tensors(entry, f"{name}[{i}]")


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())


# ---- features ----------------------------------------------------------------------------------------------------


def check_features(network: nn.Module, names: Collection[str]) -> None:
    """Raise unless the network has a module of every name.

    Raises:
        DistillationError: Names the missing module and those most like it.
    """
    known = [name for name, _ in network.named_modules() if name]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known[:3]
            raise DistillationError(
                f"features names '{name}', which {type(network).__name__} does not have; near: {', '.join(near)}"
            )


@contextmanager
def recorded(network: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules last returned, while the context lasts. Its hooks go when it ends."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    handles = [network.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def features_loss(student: Mapping[str, Any], teacher: Mapping[str, Any], weights: Mapping[str, float]) -> Tensor:
    """Weighted sum of the attention terms of the recorded features.

    Raises:
        DistillationError: If a module did not run in one of the networks, or returned no tensor.
    """
    terms = []
    for name, weight in weights.items():
        for which, features in (("student", student), ("teacher", teacher)):
            if not isinstance(features.get(name), Tensor):
                found = type(features[name]).__name__ if name in features else "nothing: it did not run"
                raise DistillationError(f"the {which}'s '{name}' returned {found}; name a module that returns a tensor")
        terms.append(weight * attention_loss(student[name], teacher[name]))
    return torch.stack(terms).sum()


# ---- the teacher -------------------------------------------------------------------------------------------------


class Teacher:
    """A frozen network in eval mode. It is no `nn.Module`, so that nothing registers, saves or trains it.

    Args:
        network: The network; it is frozen where it stands, so pass a copy.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.fingerprint = fingerprint(network)

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Collection[str] = ()) -> tuple[Any, Any]:
        """What it answers, and what the named modules return on the way."""
        with torch.no_grad(), recorded(self.network, names) as features:
            return self.network(*args, **kwargs), features

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to where the student is; free when it is there already."""
        here = next(self.network.parameters(), torch.empty(0, device=device, dtype=dtype))
        if (here.device, here.dtype) != (device, dtype):
            self.network.to(device, dtype)

    def load(self, weights: Mapping[str, Any], fingerprint: str) -> None:
        """Take over the weights of another copy of the same network."""
        self.network.load_state_dict(weights)
        self.fingerprint = fingerprint


def fingerprint(network: nn.Module) -> str:
    """Hash of names, shapes and values of all parameters and buffers, 16 hexadecimal digits; a GB takes about a second.

    Example:
        >>> fingerprint(nn.ReLU()) == fingerprint(nn.Tanh())  # no tensor in either
        True
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
