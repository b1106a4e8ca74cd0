"""Run a cut network under its labels, and see whether every channel is where the channel graph says.

Shapes alone would not tell: a shuffle that swaps channels keeps them. In the cut network the parameters carry the
labels of the channels that were kept; where two of them meet that the graph does not tie, the cut went wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dyncompress.labels import Ledger, Maps, core, varies
from dyncompress.ops import is_product, undecomposed
from dyncompress.propagation import Call, Propagation
from dyncompress.rules import rule_for


@dataclass
class Finding:
    """What went wrong in a cut network, where, and which labels were involved."""

    reason: str
    module: str
    progress: int  # ops that had run
    places: int  # places that count channels that had been passed
    labels: np.ndarray  # of the channels that met
    nearby: np.ndarray  # of the channels that the module was given


class Audit(Ledger):
    """A ledger that compares what it is told with what is known."""

    def __init__(self, classes: np.ndarray, pinned: Mapping[int, str]) -> None:
        super().__init__()
        self._next = len(classes)
        self._classes = np.append(classes, -1)  # the last stands for labels that are made in this run
        self._settled = np.zeros(len(classes) + 1, dtype=bool)  # classes that can't be cut
        self._settled[[0, -1, *pinned]] = True
        self.wrong: list[tuple[np.ndarray, str]] = []

    def _class(self, labels: np.ndarray) -> np.ndarray:
        """Class of each label; -1 for one that was made in this run."""
        found: np.ndarray = self._classes[np.minimum(labels, len(self._classes) - 1)]
        return found

    def _fixed(self, classes: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._settled[classes]
        return found

    def _report(self, labels: np.ndarray, reason: str) -> None:
        labels = np.unique(labels[(labels != 0) & (labels < len(self._classes) - 1)])
        self.wrong.append((labels, reason))

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Two channels meet: they are of one class, or both are fixed."""
        left, right = (m.numpy().ravel() for m in torch.broadcast_tensors(a, b))
        one, two = self._class(left), self._class(right)
        bad = (one != two) & (one != -1) & (two != -1)
        bad &= ~((one == 0) & self._fixed(two)) & ~((two == 0) & self._fixed(one))
        if bad.any():
            self._report(np.concatenate([left[bad], right[bad]]), reason)

    def pin(self, ids: Tensor, reason: str) -> None:
        """Whatever can't be cut was not."""
        labels = ids.numpy().ravel()
        bad = ~self._fixed(self._class(labels))
        if bad.any():
            self._report(labels[bad], reason)

    def require_uniform(self, ids: Tensor, reason: str) -> None:
        """One class, or fixed."""
        labels = ids.numpy().ravel()
        classes = self._class(labels)
        if np.unique(classes).size > 1 and not self._fixed(classes).all():
            self._report(labels, reason)


class ZeroedRun(TorchDispatchMode):
    """The original network, in which whatever multiplies the channels that are cut reads zeros.

    Its result is that of the cut network, unless a channel went astray (or the network counts its channels: takes a
    mean over them, say).

    Args:
        consumed: Labels of the operands of every product, in the order in which they run.
        kept: Whether the channel of each label stays.
    """

    def __init__(self, consumed: Sequence[Sequence[Maps]], kept: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._consumed, self._kept = iter(consumed), kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if undecomposed(func):
            with self:
                return func.decompose(*args, **kwargs)
        if is_product(func):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            masked = {id(t): self._mask(t, maps) for t, maps in zip(tensors, next(self._consumed), strict=True) if maps}
            args, kwargs = tree_map(lambda v: masked.get(id(v), v) if isinstance(v, Tensor) else v, (args, kwargs))
        return func(*args, **kwargs)

    def _mask(self, t: Tensor, maps: Maps) -> Tensor:
        for m in maps:
            compacted = m[tuple(slice(None) if d in varies(m) else slice(0, 1) for d in range(m.dim()))]
            t = t * self._kept[compacted].to(t.device, t.dtype)
        return t


class AuditedRun(Propagation):
    """Propagation through a cut network whose parameters carry the labels of what was kept.

    Args:
        net: The cut network.
        ledger: Of the classes that the cut was made for.
        axes: Labels that were kept, of every dimension of a parameter or buffer that has any.
        seams: Labels of the kept channels that leave a re-indexed module: its code is not looked into.
        taken: Ways that were taken at the places that count channels.
    """

    def __init__(
        self,
        net: nn.Module,
        ledger: Audit,
        axes: Mapping[tuple[str, int], Tensor],
        seams: Mapping[str, Tensor],
        taken: Mapping[tuple[str, int, int], int],
    ) -> None:
        self._taken = taken
        self._kept_axes, self._kept_seams = axes, seams
        self._closed: list[str] = []
        self._places = self._progress = 0
        self._failed = np.zeros(0, dtype=np.int64)
        super().__init__(net, rule_for, ledger)
        self.audit = ledger
        self.findings: list[Finding] = []

    def axis(self, name: str, dim: int, size: int) -> Tensor | None:
        """The labels that were kept."""
        return self._kept_axes.get((name, dim))

    def was_wide(self, tensor: Tensor, dim: int) -> bool:
        """By the labels that its parameter carries."""
        return (self.name_of(tensor), dim) in self._kept_axes

    def site(self, *args: Any, **kwargs: Any) -> int:
        """The way that was taken here when the network was traced."""
        turn = self._turns[self._turn]
        self._turns[self._turn] += 1
        self._places += 1
        return self._taken.get((*self._turn, turn), 0)

    def rescale(self, labels: Tensor, what: str) -> None:
        """Known from the trace."""

    def made(self, ids: Tensor) -> None:
        """Likewise."""

    def entered(self, name: str) -> None:
        """A re-indexed module begins."""
        if name in self._kept_seams:
            self._closed.append(name)

    def left(self, name: str, inputs: Any, output: Any) -> None:
        """A re-indexed module ends: its channels are known."""
        if self._closed and self._closed[-1] == name:
            self._closed.pop()
            ids = self._kept_seams[name]
            self.assign(output, (ids.view([1, -1] + [1] * (output.dim() - 2)).expand(output.shape),))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._closed:
            return func(*args, **(kwargs or {}))
        before = len(self.audit.wrong)
        self._progress += not undecomposed(func)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for labels, reason in self.audit.wrong[before:]:
            self.findings.append(self._finding(reason, labels))
        return out

    def run(self, call: Call) -> Any:
        """Run the op; where it fails, remember what it was given."""
        try:
            return super().run(call)
        except Exception:
            self._failed = self._labels(call.tensors)
            raise

    def failure(self, error: Exception) -> Finding:
        """The finding that an exception out of the network's code is."""
        text = str(error).strip().splitlines()
        first = f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
        reason = self.at(f"its code doesn't follow a cut ({first})")
        return self._finding(reason, self._failed)

    def _finding(self, reason: str, labels: np.ndarray) -> Finding:
        return Finding(reason, self.module, self._progress, self._places, labels, self._labels(self.inputs()))

    def _labels(self, tensors: Any) -> np.ndarray:
        found = [core(m).numpy() for t in tensors for m in self.maps(t)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
