"""Follow channel labels through one run of a network (label propagation under a dispatch mode).

Beside every activation travels a map of labels. Ops that only move data run *themselves* on the labels, so index
maps are exact by construction; the other ops have a rule in `rules.py`. An op without a rule pins what enters it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyncompress.labels import Ledger, Maps, compact, core, varies
from dyncompress.memory import Memory
from dyncompress.ops import FACTORIES, PRODUCTS, undecomposed
from dyncompress.recording import Operation, Recording, Seam
from dyncompress.sites import Attribute, Line, Site, Way, counted


class Propagation(TorchDispatchMode):
    """The dispatch mode.

    Args:
        net: The network that will run.
        rules: Finds the rule of an aten call.
        ledger: Where ties and pins are entered.
        decisions: The way to take at places that count channels, where it isn't the first.

    Attributes:
        costing: Whether operations are counted; off while the network runs a second time in another mode.
    """

    def __init__(
        self,
        net: nn.Module,
        rules: Callable[[Call], Callable[..., Maps | tuple[Maps, ...]] | None],
        ledger: Ledger | None = None,
        decisions: Mapping[Line, int] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger if ledger is not None else Ledger()
        self.recording = Recording(self.ledger, {})
        self.costing = True
        self._decisions = decisions or {}
        self._rules = rules
        self._names: dict[int, str] = {}
        self._state: list[Tensor] = []  # keeps the ids of _names alive
        eager = [(n, m) for n, m in net.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
        scripted = {id(t) for m in net.modules() if isinstance(m, torch.jit.ScriptModule) for t in m.parameters()}
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if id(tensor) not in scripted and (tensor.is_floating_point() or tensor.is_complex()) and tensor.dim():
                self._names.setdefault(id(tensor), name)
                self._state.append(tensor)
        self._maps: dict[int, tuple[Tensor, Maps]] = {}
        self._memory = Memory()
        self._origin: dict[int, str] = {}
        self.convolved: dict[int, str] = {}  # results of convolutions that nothing has read yet
        self._stack: list[tuple[str, nn.Module, Any]] = [("", net, ())]
        self._counted: dict[Attribute, Tensor] = {}
        self._turns: Counter[Any] = Counter()  # sites seen in each call of a module
        self._parameters = {name for name, _ in net.named_parameters()}
        self._kernels = {
            id(p)
            for m in net.modules()
            if isinstance(m, nn.modules.conv._ConvNd)
            for p in m.parameters()
            if p.dim() > 2
        }
        self._stateless: set[str] = set()
        self._made: dict[str, list[Tensor]] = {}  # channels made while a stateless module runs
        self._hooks = [h for name, module in eager for h in self._watch(name, module)]  # scripted ones take none

    def close(self) -> None:
        """Take the hooks off the network."""
        for hook in self._hooks:
            hook.remove()

    # ---- modules -------------------------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        """Path of the innermost module that is running."""
        return self._stack[-1][0]

    @property
    def running(self) -> nn.Module:
        """The innermost module that is running."""
        return self._stack[-1][1]

    @property
    def _turn(self) -> tuple[str, int]:
        """The call of a module that is running."""
        return self.module, self.recording.calls[self.module]

    def _watch(self, name: str, module: nn.Module) -> Iterable[Any]:
        if name and not module.state_dict():
            self._stateless.add(name)

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append((name, module, (args, kwargs)))
            self.recording.calls[name] += 1
            self.entered(name)

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._stack.pop()
            self.left(name, (args, kwargs), output)

        return (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )

    def entered(self, name: str) -> None:
        """A module begins."""

    def left(self, name: str, inputs: Any, output: Any) -> None:
        """A module has finished."""
        if name in self._made:
            self._close_seam(name, inputs, output, self._made.pop(name))

    def made(self, ids: Tensor) -> None:
        """Channels that the running module's code makes out of nothing can be cut only where a seam fits."""
        if self.module in self._stateless:
            self._made.setdefault(self.module, []).append(ids)
        else:
            self.ledger.pin(ids, self.at("channels are padded by the code (a module of its own could be cut)"))

    def _close_seam(self, name: str, inputs: Any, output: Any, made: list[Tensor]) -> None:
        tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        once = self.recording.calls[name] == 1
        if len(tensors) == 1 and isinstance(output, Tensor) and once:
            self.recording.seams[name] = Seam(self.ids(tensors[0], 1), self.ids(output, 1))
            return
        earlier = self.recording.seams.get(name)
        for ids in [*made, *([earlier.entering, earlier.leaving] if earlier else [])]:
            self.ledger.pin(ids, f"'{name}' pads channels and isn't called once with one tensor in and one out")

    def entering(self, size: int) -> list[Tensor]:
        """Labels of the channel dimensions of a size, among the inputs of the running module."""
        found = []
        for t in self.inputs():
            labelled = {d for m in self.maps(t) for d in varies(m)}
            found += [self.ids(t, d) for d in sorted(labelled) if t.shape[d] == size]
        return found

    def inputs(self) -> list[Tensor]:
        """Tensors that the running module was called with."""
        return [t for t in tree_leaves(self._stack[-1][2]) if isinstance(t, Tensor)]

    def operation(self, operation: Operation) -> None:
        """Enter an op that costs multiply-adds."""
        if self.costing:
            self.recording.operations.append(operation)

    def site(
        self, call: Call, labels: Tensor, numbers: Sequence[tuple[int, Tensor]], ways: Sequence[Way], *, free: bool
    ) -> int:
        """Enter a place that counts channels.

        Args:
            call: The op.
            labels: Of the channels concerned.
            numbers: Numbers in the call, each with the labels that it counts.
            ways: Ways to cut that leave the code as it is.
            free: Whether, where attributes hold the numbers, nothing needs to be tied; else the first way's ties
                hold there, too.

        Returns:
            Which of ``ways`` is taken, 0 where attributes are; -1 where none is and the channels are pinned.
        """
        path, module, _ = self._stack[-1]
        base = () if free or not ways else ways[0].ties
        patched = [Way(base, counts) for counts in counted(module, path, numbers)]
        line = (type(module).__qualname__, call.name, self._turns[self._turn])
        self._turns[self._turn] += 1
        site = Site(path, line, labels, (*patched, *ways), self._decisions.get(line, 0))
        reason = self.at(f"channels are counted by the code ({call.name})")
        self.recording.sites.append(site)
        taken = -1 if site.way is None else max(0, site.taken - len(patched))
        self.recording.taken[(*self._turn, line[2])] = taken
        if site.way is None:
            self.ledger.pin(labels, reason)
        else:
            for a, b in site.way.ties:
                self.ledger.tie(a, b, reason)
            for count in site.way.counts:  # one attribute counts one thing
                self.ledger.tie(self._counted.setdefault(count.attribute, count.labels), count.labels, reason)
        return taken

    # ---- labels --------------------------------------------------------------------------------------------------

    def maps(self, tensor: Any) -> Maps:
        """Labels of a tensor; parameters and buffers get theirs when they are first seen."""
        if not isinstance(tensor, Tensor):
            return ()
        written = self._memory.labels(tensor)
        if written is not None:
            return written
        known = self._maps.get(id(tensor))
        if known is not None:
            return known[1]
        name = self._names.get(id(tensor))
        if name is None:
            return ()
        made = []
        for d, size in enumerate(tensor.shape[:2] if id(tensor) in self._kernels else tensor.shape):
            ids = self.axis(name, d, size)
            if ids is not None:
                made.append(ids.view([-1 if i == d else 1 for i in range(tensor.dim())]).expand(tensor.shape))
        self._origin[id(tensor)] = name
        return self.assign(tensor, tuple(made))

    def axis(self, name: str, dim: int, size: int) -> Tensor | None:
        """Labels of a dimension of a parameter or buffer that is seen for the first time; None for a single one."""
        if size < 2:
            return None
        ids = self.recording.axes[name, dim] = self.ledger.fresh(size)
        return ids

    def was_wide(self, tensor: Tensor, dim: int) -> bool:
        """Whether a dimension of length 1 was longer before a cut."""
        return False

    def assign(self, tensor: Tensor, maps: Maps) -> Maps:
        """Give a tensor its labels."""
        self._maps[id(tensor)] = (tensor, maps)
        self._memory.note(tensor)
        return maps

    def write(self, target: Tensor, maps: Maps) -> None:
        """Enter labels that are written into a part of a tensor: whoever reads its memory from now on sees them."""
        whole = self.maps(self._memory.owner(target))
        if len(maps) > 1 or (len(whole) > 1 and not self._memory.is_new(target)):
            for m in maps:
                self.ledger.pin(core(m), self.at("channels of two kinds are written into part of another tensor"))
            return
        part = self._memory.part(target, whole, maps)
        for m in maps:
            self.ledger.tie_maps(torch.where(part == 0, m, part), m, self.at("written over channels that can't be cut"))
        part.copy_(maps[0] if maps else torch.zeros((), dtype=torch.int64))

    def name_of(self, tensor: Any) -> str:
        """Name of the parameter that this tensor is, or is made from; '' for an activation."""
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
            one = columns.amax(1, keepdim=True)  # constants inside a channel (0) go with it
            columns = torch.where(columns == 0, one, columns)
            self.ledger.tie(columns, one, f"one channel holds several ({self.module})")
            if (found != 0).any():
                self.ledger.tie(found, one[:, 0], reason or self.at("meets channels that can't be cut"))
            found = one[:, 0]
        return found

    @staticmethod
    def row(labels: Tensor, dim: int) -> Tensor:
        """Labels along one dimension, at the first position of the others."""
        return labels[tuple(slice(None) if k == dim else 0 for k in range(labels.dim()))]

    def merged(self, sides: Sequence[Sequence[Tensor]], reason: str) -> list[Tensor]:
        """Maps of one tensor that stem from several: those of two sides that change along a common dimension are tied.

        The finest of them stands for all.
        """
        kept: list[Tensor] = []
        for side in sides:
            fresh = []
            for m in side:
                met = [i for i, other in enumerate(kept) if set(varies(m)) & set(varies(other))]
                for i in met[:1]:
                    self.ledger.tie_maps(m, kept[i], reason)
                    if set(varies(m)) > set(varies(kept[i])):
                        kept[i] = m
                if not met:
                    fresh.append(m)
            kept += fresh
        return kept

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
        if undecomposed(func):
            with self:
                return func.decompose(*args, **kwargs)
        call = Call(self, func, args, kwargs)
        labelled = any([self.maps(t) for t in call.tensors])  # a list: every parameter must get its labels
        for t in call.tensors:
            module = self.convolved.get(id(t))
            if module is not None and ("batch_norm" not in call.name or self.recording.norms.get(module)):
                self.recording.norms[module] = ""  # something else reads it as well
        if call.name in PRODUCTS and self.costing:
            self._note_operands(call)
        out = call.out = self.run(call)
        if call.name in FACTORIES and isinstance(out, Tensor) and out.is_floating_point() and out.dim() > 1:
            self._made_by_code(call, out)
            return out
        if not labelled and call.name not in PRODUCTS:  # those cost something
            return out
        rule = self._rules(call)
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if rule is None:
            self.pin(call.tensors, self.at(f"no rule for {call.name}"))
            return out
        try:
            result = rule(call)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:  # a form of the op that its rule lacks
            self.pin(call.tensors, self.at(f"{call.name} can't be followed ({error})"))
            return out
        several = bool(result) and isinstance(result[0], tuple)
        per_output: Any = result if several else (result,) * len(outs)
        for t, maps in zip(outs, per_output, strict=False):
            if any(m.shape != t.shape for m in maps):
                self.pin(call.tensors, self.at(f"{call.name} picks by content"))
                continue
            self.assign(t, tuple(c for m in maps if varies(c := compact(m))))
            self._inherit(t, call.tensors)
        return out

    def _note_operands(self, call: Call) -> None:
        """Labels of what a product reads: of activations, or of weights where there are only these."""
        activations = any(self.maps(t) and not self.name_of(t) for t in call.tensors)
        self.recording.consumed.append([() if activations and self.name_of(t) else self.maps(t) for t in call.tensors])

    def _made_by_code(self, call: Call, made: Tensor) -> None:
        """A tensor of a written-down size gets labels: they are cut where it meets channels that are."""
        maps = []
        for d, size in enumerate(made.shape):
            if size > 1:
                ids = self.ledger.fresh(size)
                self.site(call, ids, [(size, ids)], [Way()], free=True)
                maps.append(ids.view([-1 if i == d else 1 for i in range(made.dim())]).expand(made.shape))
        self._memory.note(made, new=True)
        self.assign(made, tuple(maps))

    def rescale(self, labels: Tensor, what: str) -> None:
        """A result depends on how many of these channels there are: a mean over them, say."""
        self.recording.rescaled.append((labels, self.at(what)))

    def run(self, call: Call) -> Any:
        """Run the op itself."""
        return call.func(*call.args, **call.kwargs)

    def _inherit(self, made: Tensor, sources: Sequence[Tensor]) -> None:
        """A tensor computed from parameters alone is named after the one that gave it its size."""
        names = [self.name_of(t) for t in sources]
        if all(names):
            largest = max(range(len(sources)), key=lambda i: (sources[i].numel(), names[i] in self._parameters))
            if sources[largest].numel() == made.numel():
                self._origin[id(made)] = names[largest]


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
