"""How a student learns from the network that it was made from. Plain torch: no trainer is involved.

``losses.py`` has the formulas; here are which of them are used, how much each counts, and who teaches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyncompress.answers import paired_outputs, recorded
from dyncompress.errors import DistillationError, shown
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

KINDS = ("logits", "dist", "dkd", "channels", "mse")
RAMPS = ("linear", "cosine")
BETAS = {"dist": 1.0, "dkd": 8.0}
"""Weight of the second part of a loss that has two: as in the authors' code for CIFAR."""
TEMPERATURES = (0.001, 10_000)
"""Beyond, logits over it or its square are no numbers in fp32, or tell nothing apart."""
_LARGEST = 1e30  # a weight; its product with a loss is a number in fp32


@dataclass(frozen=True)
class DistillConfig:
    """What is added to the user's own loss: ``alpha * output term + sum of weight * feature term``.

    Attributes:
        alpha: Weight of the output term; 0 leaves only the features.
        temperature: Softens both softmaxes (every kind but ``mse``).
        features: Modules of the network, by name, whose attention maps are transferred, with a weight each.
        kind: Of class scores along dimension 1: ``logits`` (KL divergence), ``dist`` (correlations) or ``dkd``
            (target class and others apart). Of dense predictions also ``channels`` (where each class is seen). Of
            anything: ``mse`` (mean squared difference).
        beta: Weight of the second part of ``dist`` (correlation over the batch) or ``dkd`` (among other classes),
            relative to the first; by default 1 and 8.
        labels: For ``dkd``: where in a training batch the classes are, an index (1 for batches ``(x, y)``) or a key.
            By default the teacher's first choice takes their place.
        hints: Modules whose output is compared with what the kept channels of the original's module return, with a
            weight each.
        outputs: Outputs of a network that has several, by name (``output['out']``, ``output[0]``), with a weight each.
            The others teach nothing. By default all count alike, and the mean is taken.
        alpha_end: What ``alpha`` becomes by the end of training; by default it stays.
        temperature_end: Likewise.
        ramp: How they get there: ``linear`` in the steps done, or ``cosine``: slow at both ends.

    Raises:
        DistillationError: If a value is out of its range.

    Example:
        >>> DistillConfig(alpha=0.5, features={"layer3": 10.0}).temperature
        4.0
        >>> DistillConfig(alpha=1.0, alpha_end=0.0).at(0.25)
        (0.75, 4.0)
    """

    alpha: float = 1.0
    temperature: float = 4.0
    features: dict[str, float] = field(default_factory=dict)
    kind: Literal["logits", "dist", "dkd", "channels", "mse"] = "logits"
    beta: float | None = None
    labels: int | str | None = None
    hints: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    alpha_end: float | None = None
    temperature_end: float | None = None
    ramp: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha)
        _check_number("temperature", self.temperature, *TEMPERATURES)
        for key, limits in (("alpha_end", ()), ("temperature_end", TEMPERATURES), ("beta", ())):
            if getattr(self, key) is not None:
                _check_number(key, getattr(self, key), *limits)
        for key, known in (("kind", KINDS), ("ramp", RAMPS)):
            value = getattr(self, key)
            if not isinstance(value, str) or value not in known:
                raise DistillationError(f"{key} {shown(value)} is unknown; choose one of {', '.join(known)}")
        for key in ("features", "hints", "outputs"):
            _check_weights(key, getattr(self, key))
        if self.labels is not None and (isinstance(self.labels, bool) or not isinstance(self.labels, (int, str))):
            raise DistillationError(
                f"labels {shown(self.labels)} is no place in a batch; give an index, such as 1 for batches (x, y), or"
                " a key, such as 'label'"
            )
        if self.labels is not None and self.kind != "dkd":
            raise DistillationError(f"labels are for kind 'dkd'; leave them out with {self.kind!r}")
        if self.beta is not None and self.kind not in BETAS:
            raise DistillationError(f"beta is for the kinds {' and '.join(BETAS)}; leave it out with {self.kind!r}")

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules whose output is compared."""
        return tuple(dict.fromkeys((*self.features, *self.hints)))

    @property
    def changes(self) -> bool:
        """Whether it is another one later in a training."""
        return (self.alpha_end, self.temperature_end) != (None, None)

    def at(self, progress: float) -> tuple[float, float]:
        """``alpha`` and ``temperature`` when this part of a training is over.

        A pure function of progress, so that a checkpoint need not hold it: a resumed run has the same values.

        Args:
            progress: From 0 to 1.
        """
        share = progress if self.ramp == "linear" else (1 - math.cos(math.pi * progress)) / 2
        alpha, temperature = (
            start if end is None else start + (end - start) * share
            for start, end in ((self.alpha, self.alpha_end), (self.temperature, self.temperature_end))
        )
        return alpha, temperature


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _check_number(key: str, value: Any, low: float = 0, high: float = _LARGEST) -> None:
    if not (_is_number(value) and low <= value <= high):
        allowed = (
            f"a positive number from {low} to {high}; 1 to 10 is usual" if low else "a number from 0 on; 1 is usual"
        )
        raise DistillationError(f"{key} {shown(value)} is not {allowed}")


def _check_weights(key: str, weights: Any) -> None:
    things, example = ("outputs", "output[0]") if key == "outputs" else ("modules", "layer3")
    if not isinstance(weights, Mapping):
        raise DistillationError(
            f"{key} {shown(weights)} is no mapping; give names of {things} with a weight each, such as"
            f" {{'{example}': 10.0}}"
        )
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise DistillationError(f"{key} names {shown(name)}; the names of {things} are text, such as '{example}'")
        if not (_is_number(weight) and weight > 0):
            raise DistillationError(f"{key}[{shown(name)}] is {shown(weight)}; a weight is a positive number")


# ---- terms -------------------------------------------------------------------------------------------------------


def output_loss(
    student: Any, teacher: Any, config: DistillConfig, temperature: float | None = None, labels: Tensor | None = None
) -> Tensor:
    """The output term: mean of the loss over the pairs that `paired_outputs` finds, or weighted sum of those named.

    Args:
        student: What it answers.
        teacher: What its teacher answers, or `Votes` of several.
        config: Which loss.
        temperature: By default the config's.
        labels: Classes, for ``dkd``.
    """
    temperature = config.temperature if temperature is None else temperature
    votes = teacher if isinstance(teacher, Votes) else (teacher,)
    paired = [paired_outputs(student, vote, config.outputs) for vote in votes]
    softmax = {"mse": "", "channels": "positions"}.get(config.kind, "classes")
    losses = {}
    for name, (ours, _) in paired[0].items():
        theirs = blended([pairs[name][1] for pairs in paired], temperature, softmax)
        losses[name] = _loss(ours, theirs, config, temperature, labels)
    if config.outputs:
        return torch.stack([weight * losses[name] for name, weight in config.outputs.items()]).sum()
    return torch.stack(list(losses.values())).mean()


def _loss(student: Tensor, teacher: Tensor, config: DistillConfig, temperature: float, labels: Tensor | None) -> Tensor:
    beta = BETAS.get(config.kind, 0.0) if config.beta is None else config.beta
    if config.kind == "dist":
        return relation_loss(student, teacher, temperature, beta)
    if config.kind == "dkd":
        return decoupled_loss(student, teacher, temperature, beta, labels)
    if config.kind == "channels":
        return channel_loss(student, teacher, temperature)
    return squared_loss(student, teacher) if config.kind == "mse" else logit_loss(student, teacher, temperature)


Kept = Mapping[str, Sequence[tuple[int, Tensor]]]
"""By module: dimensions of its output that a student has fewer channels in, and which of the original's it keeps."""


def features_loss(
    student: Mapping[str, Any], teacher: Mapping[str, Any], config: DistillConfig, kept: Kept | None = None
) -> Tensor:
    """Weighted sum of the attention terms and hints of the recorded features.

    Args:
        student: Recorded outputs of its modules.
        teacher: Those of the original's.
        config: Names and weights.
        kept: For the hints; by default all channels.

    Raises:
        DistillationError: If a module did not run in one of the networks, or returned no tensor.
    """
    for name in config.modules:
        for which, features in (("student", student), ("teacher", teacher)):
            if not isinstance(features.get(name), Tensor):
                found = type(features[name]).__name__ if name in features else "nothing: it did not run"
                raise DistillationError(f"the {which}'s '{name}' returned {found}; name a module that returns a tensor")
    terms = [weight * attention_loss(student[name], teacher[name]) for name, weight in config.features.items()]
    for name, weight in config.hints.items():
        theirs = teacher[name]
        for dim, channels in (kept or {}).get(name, ()):
            theirs = theirs.index_select(dim, channels.to(theirs.device))
        terms.append(weight * hint_loss(student[name], theirs))
    return torch.stack(terms).sum()


# ---- teachers ----------------------------------------------------------------------------------------------------


class Votes(tuple[Any, ...]):
    """What several teachers answer to the same inputs."""

    __slots__ = ()


class Ensemble(nn.Module):
    """Several teachers as one network, which answers with `Votes`.

    Being one network, it has one fingerprint and one state dict, and goes where a single teacher goes.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *args: Any, **kwargs: Any) -> Votes:
        """What each of them answers."""
        return Votes(network(*args, **kwargs) for network in self.networks)


class Teacher:
    """A frozen network in eval mode. It is no `nn.Module`, so that nothing registers, saves or trains it.

    Args:
        network: The network, or an `Ensemble`; it is frozen where it stands, so pass a copy.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.fingerprint = fingerprint(network)

    @property
    def first(self) -> nn.Module:
        """The network, of several the first: whose features are looked at."""
        return self.network.networks[0] if isinstance(self.network, Ensemble) else self.network

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Collection[str] = ()) -> tuple[Any, Any]:
        """What it answers, and what the named modules return on the way."""
        with torch.no_grad(), recorded(self.first, names) as features:
            return self.network(*args, **kwargs), features

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to where the student is; free when it is there already."""
        here = next(self.network.parameters(), torch.empty(0, device=device, dtype=dtype))
        if (here.device, here.dtype) != (device, dtype):
            self.network.to(device, dtype)

    def load(self, weights: Mapping[str, Any], fingerprint: str) -> None:
        """Take over the weights of another copy of the same network.

        Raises:
            DistillationError: If they are of another one.
        """
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise DistillationError(
                f"the weights are of another teacher than {type(self.network).__name__}, or of several; pass the"
                " teacher= that training started with"
            ) from error
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
