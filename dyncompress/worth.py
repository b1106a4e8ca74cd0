"""Which layers are worth being dynamic, by the clock: what a bank adds to a layer's time on this device.

A method's own rule (`Method.place`) knows shapes only and says the same everywhere; this one measures, and may take a
bank away from a layer that the rule gave one, or kernels from the bank. It never gives one: only `auto` does
(`chosen`), which has no rule but the clock where costs are times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

from dyncompress.cost import Choice, CostModel
from dyncompress.graph import Operation
from dyncompress.latencytable import Layers
from dyncompress.layers import Auto, ConvSite, Method, Static
from dyncompress.layers.auto import CANDIDATES, candidates
from dyncompress.prediction import Prediction
from dyncompress.sharing import share_of

LIMIT = 0.5
"""A bank may take half as long again as the static layer: so much costs a static layer of 1.22 times the width."""


@dataclass(frozen=True)
class Worth:
    """What being dynamic costs a convolution, at given widths.

    Attributes:
        name: The convolution.
        static: Seconds of its static form.
        dynamic: Seconds of its dynamic form: what the layers that are built together take less without it.
        where: Input size and device, for people.
    """

    name: str
    static: float
    dynamic: float
    where: str

    @property
    def overhead(self) -> float:
        """What the bank adds, as a share of the static form."""
        return self.dynamic / self.static - 1

    def __str__(self) -> str:
        slow, fast = _pair(self.dynamic, self.static)
        return f"measured {slow} dynamic against {fast} static at {self.where}"


def worth(prediction: Prediction, model: CostModel, keep: Sequence[int]) -> list[Worth]:
    """What every dynamic convolution of a plan costs beside its static form.

    ``static`` is the table's time of the layer alone; ``dynamic`` is what its set, the layers that share a router with
    it, takes more with it than without it.

    Args:
        prediction: Of the network; its table measures what it lacks.
        model: The plan's cost model (``plan.costs``).
        keep: The plan's widths.

    Returns:
        One per dynamic convolution, in the order in which they run.
    """
    found = []
    for members, method, times in _dynamic(prediction, model, keep):
        found += times.worths(method, members)
    return found


def placed(prediction: Prediction, model: CostModel, keep: Sequence[int], limit: float = LIMIT) -> list[Choice]:
    """The choices of a plan, with banks only where they are worth their time.

    Layers that share a router stand and fall together: while they take more than ``1 + limit`` times what they take as
    static ones, their banks are halved once if the method has a number of kernels ``g``, then the layer whose bank
    adds most becomes static.

    Args:
        prediction: Of the network.
        model: The plan's cost model.
        keep: Its widths.
        limit: The share of a static layer's time that a bank may add.

    Returns:
        One choice per convolution, in the order of ``graph.convs``; those that changed say what was measured.
    """
    choices = dict(model.choices)
    for members, method, times in _dynamic(prediction, model, keep):
        choices |= {c.name: c for c in times.placed(method, list(members), limit)}
    return [choices[op.module] for op in model.graph.convs]


def chosen(
    auto: Auto, prediction: Prediction, model: CostModel, keep: Sequence[int], free: Sequence[Operation]
) -> list[Choice]:
    """The choices of a plan with what `auto` takes by measured times.

    All static layers are timed in the order of the network, then all that one candidate can have, and so on, each shape
    once, in the same rounds. A layer that ran right after another form of itself would find its input in the cache.

    Args:
        auto: What chooses.
        prediction: Of the network; its table measures what it lacks.
        model: The plan's cost model.
        keep: Its widths.
        free: The convolutions that it may choose for.

    Returns:
        One choice per convolution, in the order of ``graph.convs``.
    """
    times = _Times(prediction, model, keep)
    sites = {op.module: ConvSite(op.module, op.spec, op.positions) for op in free if op.spec is not None}
    able = [(op, [each.method for each in candidates(sites[op.module])[0]]) for op in free]
    forms = [
        entry
        for method in (Static(), *(each.method for each in CANDIDATES))
        for op, methods in able
        if methods and method in (Static(), *methods)
        for entry in prediction.entries_of(method, [op], model, keep)
    ]
    if forms:
        prediction.table.times(list(dict.fromkeys(forms)))
    found = dict(model.choices)
    for op in free:
        method, reason = auto.choose(sites[op.module], partial(times.seconds, op), lambda each: _pair(each)[0])
        found[op.module] = Choice(op.module, method, share_of(op, method), reason)
    return [found[op.module] for op in model.graph.convs]


def _dynamic(
    prediction: Prediction, model: CostModel, keep: Sequence[int]
) -> list[tuple[list[Operation], Method, _Times]]:
    """The sets of dynamic convolutions, with the forms that they are compared in measured in the same rounds.

    One form of every set runs, then the next of every set: right after another form of itself a layer would find its
    input in the cache.
    """
    times = _Times(prediction, model, keep)
    methods = [(members, model.choices[members[0].module].method) for members in model.sets]
    found = [(members, method, times) for members, method in methods if not isinstance(method, Static)]
    compared: list[list[list[Layers]]] = []
    for members, method, _ in found:
        subsets = [members, *([op for op in members if op is not left] for left in members)]
        asked = [(form, subset) for form in (method, *_halved(method)) for subset in subsets if subset]
        compared.append([prediction.entries_of(*each, model, keep) for each in [(Static(), members), *asked]])
    forms = [entry for turn in zip_longest(*compared, fillvalue=()) for entries in turn for entry in entries]
    if forms:
        prediction.table.times(forms)
    return found


def _halved(method: Method) -> list[Method]:
    """The method with half as many kernels, where it has a number of them and two are left."""
    g = getattr(method, "g", 0)
    return [replace(method, g=g // 2)] if g >= 4 else []  # type: ignore[type-var]


class _Times:
    """Times of layers that are built together, by the table."""

    def __init__(self, prediction: Prediction, model: CostModel, keep: Sequence[int]) -> None:
        self.prediction, self.model, self.keep = prediction, model, keep

    def time(self, method: Method, members: Sequence[Operation]) -> float:
        """In units of the table's reference; each alone if they are static."""
        entries = self.prediction.entries_of(method, members, self.model, self.keep)
        return sum(self.prediction.table.times(entries)) if entries else 0.0

    def seconds(self, op: Operation, method: Method) -> float:
        """Of one layer alone."""
        return self.time(method, [op]) * self._unit

    def worths(self, method: Method, members: Sequence[Operation]) -> list[Worth]:
        whole, unit = self.time(method, members), self.prediction.table.reference
        found = []
        for op in members:
            others = [other for other in members if other is not op]
            adds = max(0.0, whole - self.time(method, others))
            found.append(Worth(op.module, self.time(Static(), [op]) * unit, adds * unit, self._where(op)))
        return found

    def placed(self, method: Method, members: list[Operation], limit: float) -> list[Choice]:
        changed: list[Choice] = []
        halved = ""
        while members and self.time(method, members) > (1 + limit) * self.time(Static(), members):
            fewer = _halved(method)
            if not halved and fewer:
                slow, fast = _pair(*(self.time(m, members) * self._unit for m in (method, Static())))
                g = getattr(method, "g", 0)
                halved = f"g {g} -> {g // 2}: measured {slow} with {g} kernels against {fast} static, of its block"
                method = fewer[0]
                continue
            worst = max(self.worths(method, members), key=lambda w: w.dynamic - w.static)
            members = [op for op in members if op.module != worst.name]
            changed.append(Choice(worst.name, Static(), reason=f"static: {worst}"))
        before = self.model.choices
        kept = [
            replace(before[op.module], method=method, reason=halved) if halved else before[op.module] for op in members
        ]
        return [*changed, *kept]

    @property
    def _unit(self) -> float:
        return self.prediction.table.reference

    def _where(self, op: Operation) -> str:
        run = self.prediction.entries_of(Static(), [op], self.model, self.keep)[0].runs[0]
        threads = self.prediction.table.device.threads
        return f"{'x'.join(map(str, run.size))}, {threads} thread{'s' * (threads != 1)}"


def _pair(*seconds: float) -> tuple[str, ...]:
    """Times as people read them, in one unit."""
    scale, unit = (1e6, "us") if max(seconds) < 1e-3 else (1e3, "ms")
    return tuple(f"{s * scale:.3g} {unit}" for s in seconds)
