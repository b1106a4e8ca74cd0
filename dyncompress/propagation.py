"""Follow channel labels through one run of a network (label propagation under a dispatch mode).

Beside every activation travels a map of labels. Ops that only move data run *themselves* on the labels, so index
maps are exact by construction; the other ops have a rule in `rules.py`. An op without a rule pins what enters it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyncompress.labels import Ledger, Maps, compact, core, varies

Axis = tuple[str, int]
"""A dimension of a named parameter or buffer."""


@dataclass
class Operation:
    """One multiply-accumulate op: ``macs = fixed * prod(kept channels of each axis)``."""

    module: str  # innermost module that was running
    kind: str  # "conv", "conv_transpose" or "matmul"
    weight: str  # name of the parameter, "" for a product of two activations
    fixed: int  # kernel elements x positions, both sides of the batch included
    axes: tuple[Tensor, ...]  # labels of the dimensions that the cost is proportional to
    positions: int = 0  # output positions of one image


@dataclass
class Seam:
    """A parameter-free module that makes channels of its own (a zero-padded shortcut, say).

    Its code counts channels, so a cut network must show it the original ones: see `narrowing.Reindex`.
    """

    entering: Tensor  # labels of the channels that enter, [C_in]
    leaving: Tensor  # labels of the channels that leave, [C_out]


@dataclass
class Recording:
    """What one run of the network left behind."""

    ledger: Ledger
    axes: dict[Axis, Tensor]
    operations: list[Operation] = field(default_factory=list)
    seams: dict[str, Seam] = field(default_factory=dict)
    residual_modules: set[str] = field(default_factory=set)
    norms: dict[str, str] = field(default_factory=dict)  # convolution -> the BatchNorm that alone reads it
    calls: dict[str, int] = field(default_factory=dict)


class Propagation(TorchDispatchMode):
    """The dispatch mode; `rules` maps an aten op's name to ``rule(self, call)``."""

    def __init__(self, net: nn.Module, rules: Callable[[Call], Callable[..., Maps | tuple[Maps, ...]] | None]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording(Ledger(), {})
        self.ledger = self.recording.ledger
        self._rules = rules
        self._names: dict[int, str] = {}
        self._state: list[Tensor] = []  # keeps the ids of _names alive
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() > 0:
                self._names.setdefault(id(tensor), name)
                self._state.append(tensor)
        self._maps: dict[int, tuple[Tensor, Maps]] = {}
        self._origin: dict[int, str] = {}
        self.convolved: dict[int, str] = {}  # results of convolutions that nothing has read yet
        self._stack: list[str] = [""]
        self._stateless: set[str] = set()
        self._made: dict[str, list[Tensor]] = {}  # channels made while a stateless module runs
        self._hooks = [h for n, m in net.named_modules() for h in self._watch(n, m)]

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    # ---- modules -------------------------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        """Path of the innermost module that is running."""
        return self._stack[-1]

    def _watch(self, name: str, module: nn.Module) -> Iterable[Any]:
        if name and not module.state_dict():
            self._stateless.add(name)

        def enter(_: nn.Module, __: Any) -> None:
            self._stack.append(name)
            self.recording.calls[name] = self.recording.calls.get(name, 0) + 1

        def leave(_: nn.Module, inputs: Any, output: Any) -> None:
            self._stack.pop()
            if name in self._made:
                self._close_seam(name, inputs, output, self._made.pop(name))

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def made(self, ids: Tensor) -> None:
        """Channels that the running module's code makes out of nothing can be cut only where a seam fits."""
        if self.module in self._stateless:
            self._made.setdefault(self.module, []).append(ids)
        else:
            self.ledger.pin(ids, self.at("channels are padded by the code (a module of its own could be cut)"))

    def _close_seam(self, name: str, inputs: Any, output: Any, made: list[Tensor]) -> None:
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        once = self.recording.calls[name] == 1
        if len(tensors) == 1 and isinstance(output, Tensor) and once:
            self.recording.seams[name] = Seam(self.ids(tensors[0], 1), self.ids(output, 1))
            return
        earlier = self.recording.seams.get(name)
        for ids in [*made, *([earlier.entering, earlier.leaving] if earlier else [])]:
            self.ledger.pin(ids, f"'{name}' pads channels and isn't called once with one tensor in and one out")

    # ---- labels --------------------------------------------------------------------------------------------------

    def maps(self, tensor: Any) -> Maps:
        """Labels of a tensor; parameters and buffers get theirs when they are first seen."""
        if not isinstance(tensor, Tensor):
            return ()
        known = self._maps.get(id(tensor))
        if known is not None:
            return known[1]
        name = self._names.get(id(tensor))
        if name is None:
            return ()
        made = []
        for d, size in enumerate(tensor.shape):
            if size > 1:
                ids = self.recording.axes[name, d] = self.ledger.fresh(size)
                made.append(ids.view([-1 if i == d else 1 for i in range(tensor.dim())]).expand(tensor.shape))
        self._origin[id(tensor)] = name
        return self.assign(tensor, tuple(made))

    def assign(self, tensor: Tensor, maps: Maps) -> Maps:
        """Give a tensor its labels."""
        self._maps[id(tensor)] = (tensor, maps)
        return maps

    def name_of(self, tensor: Any) -> str:
        """Name of the parameter that this tensor is, or is a view of; '' for an activation."""
        return self._origin.get(id(tensor), "")

    def ids(self, tensor: Tensor, dim: int, reason: str = "") -> Tensor:
        """One label per channel of a dimension; zeros where it carries none. Ties what changes elsewhere too."""
        found = torch.zeros(tensor.shape[dim], dtype=torch.int64)
        for m in self.maps(tensor):
            if dim not in varies(m):
                continue
            rest = m.movedim(dim, 0)
            rest = rest[tuple([slice(None)] + [slice(None) if d in varies(rest) else 0 for d in range(1, rest.dim())])]
            columns = rest.reshape(rest.shape[0], -1)
            self.ledger.tie(columns, columns[:, :1], f"one channel holds several ({self.module})")
            if (found != 0).any():
                self.ledger.tie(found, columns[:, 0], reason)
            found = columns[:, 0]
        return found

    def pin(self, tensors: Iterable[Any], reason: str) -> None:
        """Pin every label of these tensors."""
        for t in tensors:
            for m in self.maps(t):
                self.ledger.pin(core(m), reason)

    def at(self, what: str) -> str:
        """``what`` with the place where it happened, for a reason that a person reads."""
        return f"{what} in '{self.module or 'the network'}'"

    # ---- dispatch ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = Call(self, func, args, kwargs)
        labelled = any([self.maps(t) for t in call.tensors])  # a list: every parameter must get its labels
        names = [self.name_of(t) for t in call.tensors]
        for t in call.tensors:
            module = self.convolved.get(id(t))
            if module is not None and ("batch_norm" not in call.name or self.recording.norms.get(module)):
                self.recording.norms[module] = ""  # something else reads it as well
        out = func(*args, **kwargs)
        if not labelled:
            return out
        call.out = out
        rule = self._rules(call)
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if rule is None:
            self.pin(call.tensors, self.at(f"no rule for {call.name}"))
            return out
        try:
            result = rule(call)
        except (
            RuntimeError,
            ValueError,
            IndexError,
            TypeError,
        ) as error:  # a form of the op that its rule doesn't know
            self.pin(call.tensors, self.at(f"{call.name} can't be followed ({error})"))
            return out
        several = bool(result) and isinstance(result[0], tuple)
        per_output: Any = result if several else (result,) * len(outs)
        for t, maps in zip(outs, per_output, strict=False):
            if any(m.shape != t.shape for m in maps):
                self.pin(call.tensors, self.at(f"{call.name} picks by content"))
                continue
            self.assign(t, tuple(compact(m) for m in maps))
            origin = next((n for n in names if n), "")
            if origin and len(call.tensors) == 1:
                self._origin[id(t)] = origin
        return out


class Call:
    """One aten call, with its arguments by name."""

    def __init__(self, mode: Propagation, func: Any, args: Any, kwargs: Any) -> None:
        self.mode, self.func, self.args, self.kwargs = mode, func, args, kwargs
        self.name: str = func._schema.name.removeprefix("aten::")
        self.out: Any = None
        self.tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the op's schema."""
        for i, a in enumerate(self.func._schema.arguments):
            if a.name == name:
                if name in self.kwargs:
                    return self.kwargs[name]
                return self.args[i] if i < len(self.args) else a.default_value
        return default

    @property
    def first_out(self) -> Tensor:
        """The op's result, the first where there are several."""
        out: Tensor = next(t for t in tree_leaves(self.out) if isinstance(t, Tensor))
        return out
