"""The plan: what becomes of every layer. A frozen value that a person can read as a table and edit as JSON.

A plan holds the channel graph of the network it was made for, how many channels every width group keeps, and the
method of every convolution. All numbers in it are derived from these three and recomputed when a file is read, so
an edited plan can't lie about its cost.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dyncompress import files
from dyncompress.budget import UNITS, Budget, Limit, readable
from dyncompress.cost import Choice, CostModel, narrow_spec, operation_macs, static_choices, widths
from dyncompress.errors import DynCompressError, PlanError, shown
from dyncompress.graph import ConvGraph, Operation
from dyncompress.layers import Static, get_method
from dyncompress.planfile import AGAIN, LONGEST, SCHEMA, Document, Keep, Pace, kept, network_entry, ranges
from dyncompress.typed import MOST


@dataclass(frozen=True)
class LayerPlan:
    """One layer before and after: a row of the table."""

    name: str
    kind: str
    method: str
    reason: str
    in_before: int
    in_after: int
    out_before: int
    out_after: int
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


@dataclass(frozen=True)
class Plan:
    """The decision; `convert` carries it out.

    Attributes:
        graph: Channel graph of the network that the plan was made for.
        keep: Per width group, how many channels stay (the best by magnitude), or which.
        choices: What becomes of each of ``graph.convs``, in that order.
        method: Registered name of the plan's method.
        options: Its options.
        target: What was asked, as text.
        allocation: How the widths were found: ``uniform``, ``importance``, ``sensitivity``, or ``edited``.
        importance: How channels were ranked: ``magnitude``, ``bn`` or ``taylor``.
        latency: Predicted and measured time over the original's, where the target asked for it.
    """

    graph: ConvGraph
    keep: tuple[Keep, ...]
    choices: tuple[Choice, ...]
    method: str
    options: dict[str, Any]
    target: str
    allocation: str
    importance: str = "magnitude"
    latency: Pace | None = None

    # ---- numbers -------------------------------------------------------------------------------------------------

    @property
    def widths(self) -> list[int]:
        """Channels that every width group keeps."""
        return [k if isinstance(k, int) else len(k) for k in self.keep]

    @cached_property
    def _before(self) -> CostModel:
        return CostModel(self.graph, static_choices(self.graph, Static()))

    @cached_property
    def costs(self) -> CostModel:
        """What the student costs, as a function of its widths."""
        return CostModel(self.graph, self.choices)

    @property
    def macs_before(self) -> int:
        """MACs of the original, for one image."""
        return self._before.macs(widths(self.graph))

    @property
    def macs_after(self) -> int:
        """MACs of the student, for one image: convolutions, kernel assembly and routers."""
        return self.costs.macs(self.widths)

    @property
    def params_before(self) -> int:
        """Parameters of the original."""
        return self._before.params(widths(self.graph))

    @property
    def params_after(self) -> int:
        """Parameters of the student."""
        return self.costs.params(self.widths)

    @property
    def ratio(self) -> float:
        """MACs of the student over those of the original."""
        return self.macs_after / self.macs_before

    @property
    def params_ratio(self) -> float:
        """Parameters of the student over those of the original."""
        return self.params_after / self.params_before

    @property
    def asked(self) -> list[tuple[Limit, float, float]]:
        """Every limit of the target on MACs or parameters, and its value asked and achieved, as fractions."""
        found = []
        for limit in Budget.parse(self.target).limits:
            if limit.quantity != "latency":  # a matter of the machine, not of the plan
                before, after = (getattr(self, f"{limit.quantity}_{when}") for when in ("before", "after"))
                found.append((limit, limit.fraction(before), after / before))
        return found

    @property
    def fingerprint(self) -> str:
        """Hash of the names and shapes of the network that the plan fits."""
        return self.graph.fingerprint

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Every layer that costs anything, in the order in which they run."""
        full = widths(self.graph)
        before, after = self._before.layers(full), self.costs.layers(self.widths)
        choices = {c.name: c for c in self.choices}
        rows = []
        for op in self.graph.operations:
            if op.spec is not None:
                choice, spec = choices[op.module], narrow_spec(self.graph, op, self.widths)
                (macs, params), (macs_now, params_now) = before[op.module], after[op.module]
                reason = "; ".join(r for r in (choice.reason, op.reason and f"width kept: {op.reason}") if r)
                rows.append(
                    LayerPlan(op.module, op.kind, choice.method.name, reason, op.spec.in_channels, spec.in_channels,
                              op.spec.out_channels, spec.out_channels, macs.total, macs_now.total, params, params_now)
                )  # fmt: skip
            elif op.weight or op.kind.startswith("conv"):
                rows.append(self._fixed_row(op, full))
        return tuple(rows)

    def _fixed_row(self, op: Operation, full: Sequence[int]) -> LayerPlan:
        sizes = [
            [fixed + sum(keep[g] * each for g, each in parts) for fixed, parts in op.axes]
            for keep in (full, self.widths)
        ]
        reads, writes = (1, 0) if op.kind == "conv" else (0, 1)
        before, after = ([*s, 1, 1][:2] for s in sizes)
        kernel = math.prod(self.graph.parameters.get(op.weight, (1, 1))[2:])
        reasons = {"static": op.static, "width kept": op.reason}
        reason = "; ".join(f"{what}: {why}" for what, why in reasons.items() if why)
        return LayerPlan(
            op.module, op.kind, "static", reason, before[reads], after[reads],
            before[writes], after[writes], operation_macs(op, full), operation_macs(op, self.widths),
            before[0] * before[1] * kernel, after[0] * after[1] * kernel,
        )  # fmt: skip

    # ---- for people ----------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """The plan as a table for a terminal."""
        table = Table(
            title=escape(
                f"{self.method} at {self.target}: {readable(self.macs_after)} of {readable(self.macs_before)} MACs"
                f" ({self.ratio:.2%}), {readable(self.params_after)} of {readable(self.params_before)} parameters"
                f" ({self.params_ratio:.2%})"
            ),
            caption=escape(
                f"{self._told()}widths: {self.allocation}, channels by {self.importance};"
                f" MACs of one image, kernel assembly and routers included{self._left_out()}"
            ),
            title_style="bold",
        )
        for column, justify in (("layer", "left"), ("in", "right"), ("out", "right"), ("method", "left"),
                                ("MACs", "right"), ("", "right"), ("why", "left")):  # fmt: skip
            table.add_column(column, justify=justify, overflow="fold" if column == "why" else "ellipsis")  # type: ignore[arg-type]
        for row in self.layers:
            table.add_row(
                escape(row.name),
                _change(row.in_before, row.in_after),
                _change(row.out_before, row.out_after),
                escape(row.method),
                f"{readable(row.macs_before)} > {readable(row.macs_after)}",
                f"{row.macs_after / max(row.macs_before, 1):.0%}",
                escape(row.reason),
            )
        return table

    def _left_out(self) -> str:
        unseen = self.graph.unseen
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        return f"; the example never ran {', '.join(unseen[:5])}{more}: left as they are" if unseen else ""

    def _told(self) -> str:
        told = [f"asked {a:.2%} of the {UNITS[limit.quantity]}, achieved {b:.2%}; " for limit, a, b in self.asked]
        limit = Budget.parse(self.target).limit("latency")
        if limit is not None and self.latency is not None:
            told.append(
                f"asked {limit.value:.0%} of the batch-1 latency, measured {self.latency.measured:.0%}, predicted"
                f" {self.latency.predicted:.0%} ({self.latency.device}); "
            )
        return "".join(told)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(width=140, file=text).print(self.table())
        return text.getvalue()

    # ---- for files -----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON. Edit ``groups[].keep``, and a layer's ``method`` and ``options``; the rest is derived."""
        rows = {row.name: row for row in self.layers}
        data = {
            "schema": SCHEMA,
            "target": self.target,
            "method": self.method,
            "options": self.options,
            "allocation": self.allocation,
            "importance": self.importance,
            "summary": {
                "macs": [self.macs_before, self.macs_after],
                "params": [self.params_before, self.params_after],
                "ratio": round(self.ratio, 6),
                "asked": {limit.text: [round(a, 6), round(b, 6)] for limit, a, b in self.asked},
            },
            **({} if self.latency is None else {"latency": dataclasses.asdict(self.latency)}),
            "groups": [
                {"name": g.name, "channels": g.channels, "keep": k if isinstance(k, int) else ranges(k)}
                for g, k in zip(self.graph.groups, self.keep, strict=True)
            ],
            "layers": [
                {
                    "name": c.name,
                    "method": c.method.name,
                    "options": dataclasses.asdict(c.method),  # type: ignore[call-overload]
                    "share": c.share,
                    "reason": c.reason,
                    "out": [rows[c.name].out_before, rows[c.name].out_after],
                    "macs": [rows[c.name].macs_before, rows[c.name].macs_after],
                }
                for c in self.choices
            ],
            "network": network_entry(self.graph),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: If the text is no plan, of another schema, or asks for what the network can't do.
        """
        file = Document.read(text)
        try:
            return cls._from(file)
        except DynCompressError as error:
            raise PlanError(f"the plan can't be read: {error}") from None
        except (TypeError, ValueError, OverflowError) as error:  # of a registered method's options
            raise PlanError(f"the plan is malformed ({type(error).__name__}: {error}); {AGAIN}") from None

    @classmethod
    def _from(cls, file: Document) -> Plan:
        graph = file.network.graph()
        Budget.parse(file.target)
        get_method(file.method, **file.options)
        known = [op.module for op in graph.convs]
        if [entry.name for entry in file.layers] != known:
            named = shown([entry.name for entry in file.layers])
            raise PlanError(f"its layers are {named}; the network's are {shown(known)}: {AGAIN}")
        choices = tuple(Choice(e.name, get_method(e.method, **e.options), e.share, e.reason) for e in file.layers)
        keep = kept(graph.groups, file.groups)
        asked = (file.target, file.allocation, file.importance, file.latency)
        plan = cls(graph, keep, choices, file.method, file.options, *asked)
        numbers = {"macs": [plan.macs_before, plan.macs_after], "params": [plan.params_before, plan.params_after]}
        for what, (before, after) in numbers.items():
            if not (0 < before <= MOST and 0 < after <= MOST):
                raise PlanError(
                    f"its network has {shown(before)} {UNITS[what]}, and {shown(after)} at its widths; a network has 1"
                    f" to 2**62: {AGAIN}"
                )
        # a file that was edited tells other numbers than those that follow from it
        edited = numbers["macs"] != file.summary.get("macs")
        return dataclasses.replace(plan, allocation="edited", latency=None) if edited else plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; an existing file is replaced in one step, or not at all.

        Raises:
            WriteError: If the file can't be written.
        """
        files.write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: If there is no such file, or it holds no plan.
        """
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"there is no plan at '{path}'; write one with `dyncompress plan RECIPE --out {path}`")
        if path.stat().st_size > LONGEST:
            raise PlanError(f"'{path}' has {path.stat().st_size} bytes; a plan has at most {LONGEST}: {AGAIN}")
        try:
            return cls.from_json(path.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise PlanError(
                f"'{path}' is no text ({error}); write a plan with `dyncompress plan` or Plan.save"
            ) from None


def _change(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} > {after}"
