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
from rich.table import Table

from dyncompress.budget import UNITS, Budget, Limit, readable
from dyncompress.cost import Choice, CostModel, narrow_spec, operation_macs, static_choices, widths
from dyncompress.errors import DynCompressError, PlanError
from dyncompress.graph import ConvGraph, Group, Operation
from dyncompress.layers import ConvSpec, Static, get_method

SCHEMA = 2
Keep = int | tuple[int, ...]


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
    """

    graph: ConvGraph
    keep: tuple[Keep, ...]
    choices: tuple[Choice, ...]
    method: str
    options: dict[str, Any]
    target: str
    allocation: str
    importance: str = "magnitude"

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
            title=f"{self.method} at {self.target}: {readable(self.macs_after)} of {readable(self.macs_before)} MACs"
            f" ({self.ratio:.2%}), {readable(self.params_after)} of {readable(self.params_before)} parameters"
            f" ({self.params_ratio:.2%})",
            caption=f"{self._told()}widths: {self.allocation}, channels by {self.importance};"
            f" MACs of one image, kernel assembly and routers included{self._left_out()}",
            title_style="bold",
        )
        for column, justify in (("layer", "left"), ("in", "right"), ("out", "right"), ("method", "left"),
                                ("MACs", "right"), ("", "right"), ("why", "left")):  # fmt: skip
            table.add_column(column, justify=justify, overflow="fold" if column == "why" else "ellipsis")  # type: ignore[arg-type]
        for row in self.layers:
            table.add_row(
                row.name,
                _change(row.in_before, row.in_after),
                _change(row.out_before, row.out_after),
                row.method,
                f"{readable(row.macs_before)} > {readable(row.macs_after)}",
                f"{row.macs_after / max(row.macs_before, 1):.0%}",
                row.reason,
            )
        return table

    def _left_out(self) -> str:
        unseen = self.graph.unseen
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        return f"; the example never ran {', '.join(unseen[:5])}{more}: left as they are" if unseen else ""

    def _told(self) -> str:
        told = [f"asked {a:.2%} of the {UNITS[limit.quantity]}, achieved {b:.2%}; " for limit, a, b in self.asked]
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
            "groups": [
                {"name": g.name, "channels": g.channels, "keep": k if isinstance(k, int) else _ranges(k)}
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
            "network": {"fingerprint": self.fingerprint, **_graph_to_dict(self.graph)},
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: If the text is no plan, of another schema, or asks for what the network can't do.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is no JSON ({error}); write one with `dyncompress plan` or Plan.save") from None
        if not isinstance(data, dict) or "schema" not in data:
            raise PlanError("the JSON is no plan (it has no 'schema'); write one with `dyncompress plan` or Plan.save")
        if data["schema"] != SCHEMA:
            raise PlanError(
                f"the plan has schema {data['schema']!r}, this version reads {SCHEMA};"
                " make it again with `dyncompress plan`"
            )
        try:
            graph = _graph_from_dict(data["network"])
            keep = tuple(_keep(g, entry) for g, entry in zip(graph.groups, data["groups"], strict=True))
            choices = tuple(
                Choice(e["name"], get_method(e["method"], **e["options"]), e["share"], e["reason"])
                for e in data["layers"]
            )
            Budget.parse(data["target"])
            known = [op.module for op in graph.convs]
            if [c.name for c in choices] != known:
                raise PlanError(f"the plan's layers are {[c.name for c in choices]}; the network's are {known}")
            plan = cls(
                graph, keep, choices, data["method"], data["options"], data["target"], data["allocation"],
                data.get("importance", "magnitude"),  # the only one there was when plans did not name it
            )  # fmt: skip
            asked = data["summary"]["macs"][1]
            return plan if plan.macs_after == asked else dataclasses.replace(plan, allocation="edited")
        except DynCompressError as error:
            raise PlanError(f"the plan can't be read: {error}") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise PlanError(
                f"the plan is malformed ({type(error).__name__}: {error}); make it again with `dyncompress plan`"
                " and edit only 'keep', 'method' and 'options'"
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: If there is no such file, or it holds no plan.
        """
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"there is no plan at '{path}'; write one with `dyncompress plan RECIPE --out {path}`")
        return cls.from_json(path.read_text())


def _change(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} > {after}"


def _ranges(kept: Sequence[int]) -> str:
    """Channel numbers as text: (0, 1, 2, 5) is '0-2,5'."""
    parts: list[list[int]] = []
    for c in kept:
        if parts and parts[-1][1] == c - 1:
            parts[-1][1] = c
        else:
            parts.append([c, c])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _keep(group: Group, entry: dict[str, Any]) -> Keep:
    keep = entry["keep"]
    if isinstance(keep, str):
        spans = [part.split("-") for part in keep.split(",")]
        limits = [(int(span[0]), int(span[-1])) for span in spans]
        if any(not 0 <= a <= b < group.channels for a, b in limits):
            raise PlanError(f"group '{group.name}' keeps channels {keep!r}; it has 0 to {group.channels - 1}")
        return tuple(sorted({c for a, b in limits for c in range(a, b + 1)}))
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= group.channels:
        raise PlanError(f"group '{group.name}' keeps {keep!r} channels; keep 1 to {group.channels}")
    return keep


def _graph_to_dict(graph: ConvGraph) -> dict[str, Any]:
    """The graph in plain types, one line's worth per entry."""
    return {
        "operations": [dataclasses.asdict(op) for op in graph.operations],
        "groups": [[g.name, g.channels] for g in graph.groups],
        "axes": graph.axes,
        "seams": graph.seams,
        "counts": graph.counts,
        "unseen": graph.unseen,
        "rescaled": graph.rescaled,
        "parameters": graph.parameters,
    }


def _graph_from_dict(data: dict[str, Any]) -> ConvGraph:
    def tuples(value: Any) -> Any:
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    operations = []
    for entry in data["operations"]:
        fields = {k: tuples(v) for k, v in entry.items()}
        if entry["spec"] is not None:
            fields["spec"] = ConvSpec(**{k: tuples(v) for k, v in entry["spec"].items()})
        operations.append(Operation(**fields))
    named: Any = {
        part: {k: tuples(v) for k, v in data[part].items()} for part in ("axes", "seams", "parameters", "counts")
    }
    notes: Any = {part: tuple(data[part]) for part in ("unseen", "rescaled")}
    return ConvGraph(tuple(operations), tuple(Group(*g) for g in data["groups"]), **named, **notes)
