"""Run a cut network under its labels, and see whether every channel is where the channel graph says.

Shapes alone would not tell: a shuffle that swaps channels keeps them. In the cut network the parameters carry the
labels of the channels that were kept; where two of them meet that the graph does not tie, the cut went wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dyncompress.labels import Ledger, core, varies
from dyncompress.propagation import Call, Propagation
from dyncompress.rules import rule_for
from dyncompress.sites import Line


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
        self._classes, self._pinned = classes, pinned
        self.wrong: list[tuple[np.ndarray, str]] = []

    def _class(self, labels: np.ndarray) -> np.ndarray:
        """Class of each label; -1 for one that was made in this run."""
        known = labels < len(self._classes)
        return np.where(known, self._classes[np.where(known, labels, 0)], -1)

    def _fixed(self, classes: np.ndarray) -> np.ndarray:
        return np.isin(classes, [*self._pinned, 0, -1])

    def _report(self, labels: np.ndarray, reason: str) -> None:
        labels = np.unique(labels[(labels != 0) & (labels < len(self._classes))])
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


CONSUMERS = frozenset(
    "convolution mm bmm addmm baddbmm mv mkldnn_rnn_layer _scaled_dot_product_flash_attention_for_cpu".split()
)


class ZeroedRun(Propagation):
    """Propagation through the original network, in which whatever reads the channels that are cut reads zeros.

    Its result is that of the cut network, unless a channel went astray (or the network counts its channels: takes a
    mean over them, say).

    Args:
        net: The original network.
        decisions: Ways that were taken at the places that count channels.
        kept: Whether the channel of each label stays.
    """

    def __init__(self, net: nn.Module, decisions: Mapping[Line, int], kept: Tensor) -> None:
        super().__init__(net, rule_for, decisions=decisions)
        self._kept = kept

    def run(self, call: Call) -> Any:
        """Run the op on masked operands."""
        if call.name not in CONSUMERS:
            return super().run(call)
        given = [t for t in call.tensors if self.maps(t)]
        activations = [t for t in given if not self.name_of(t)]  # one side of a product is enough
        masked = {id(t): self._mask(t) for t in activations or given}
        args, kwargs = tree_map(
            lambda v: masked.get(id(v), v) if isinstance(v, Tensor) else v, (call.args, call.kwargs)
        )
        return call.func(*args, **kwargs)

    def _mask(self, t: Tensor) -> Tensor:
        for m in self.maps(t):
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
        self._progress += 1
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
