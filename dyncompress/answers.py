"""What two networks answer, and which of their tensors belong together."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dyncompress.errors import DistillationError


def paired_outputs(student: Any, teacher: Any, names: Collection[str] = ()) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors of two networks' answers that belong together, by their name in the student's.

    An answer is a tensor (``output``), a mapping (its ``logits`` or ``out`` where there is one, else every entry:
    ``output['boxes']``), or a sequence (every entry: ``output[0]``). Where one network gives one tensor and the other
    several (auxiliary heads that exist only while training), the first is taken.

    Args:
        student: What it answers.
        teacher: What it answers.
        names: Outputs to take instead, whatever else there is.

    Raises:
        DistillationError: If the two answer differently, or one lacks a name; says what there is.
    """
    ours, theirs = (dict(answer_tensors(a, every=bool(names))) for a in (student, teacher))
    if not ours or not theirs:
        which, answer = ("student", student) if not ours else ("teacher", teacher)
        raise DistillationError(
            f"the {which} answers with a {type(answer).__name__} without a floating-point tensor [B, ...]; distillation"
            " takes a tensor, or a dict, tuple or list of tensors: use distill=False for this network"
        )
    for which, found in (("student", ours), ("teacher", theirs)):
        missing = [name for name in names if name not in found]
        if missing:
            raise DistillationError(
                f"the {which} has no output {', '.join(missing)}; it answers {_shapes(found)}: name some of these in"
                " DistillConfig(outputs=)"
            )
    if names:
        pairs = {name: (ours[name], theirs[name]) for name in names}
    elif 1 in (len(ours), len(theirs)):
        name, first = next(iter(ours.items()))
        pairs = {name: (first, next(iter(theirs.values())))}
    else:
        pairs = {name: (ours[name], theirs[name]) for name in ours if ours.keys() == theirs.keys()}
    if not pairs or any(s.shape != t.shape for s, t in pairs.values()):
        raise DistillationError(
            f"the teacher answers {_shapes(theirs)}, the student {_shapes(ours)}; both must have the same outputs: pass"
            " a teacher of the same task"
        )
    return pairs


def answer_tensors(answer: Any, name: str = "output", *, every: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every floating-point [B, ...] in a network's answer that distillation looks at.

    Args:
        answer: What a network answers.
        name: What it is called.
        every: Also look beside a mapping's ``logits`` or ``out``.
    """
    if isinstance(answer, Tensor):
        if answer.is_floating_point() and answer.dim():
            yield name, answer
    elif isinstance(answer, Mapping):
        main = None if every else next((key for key in ("logits", "out") if key in answer), None)
        for key in answer if main is None else [main]:
            yield from answer_tensors(answer[key], f"{name}[{key!r}]", every=every)
    elif isinstance(answer, (tuple, list)):
        for i, entry in enumerate(answer):
            yield from answer_tensors(entry, f"{name}[{i}]", every=every)


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())


# ---- on the way --------------------------------------------------------------------------------------------------


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
                f"distillation names '{name}', which {type(network).__name__} does not have; near: {', '.join(near)}"
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
