"""Who takes part: a way to narrow and convert a network, and how it is trained, as data.

What a dynamic arm gets beside its method (allocation, warm start, distillation), a static arm gets, too: otherwise
nobody could tell what the dynamic layers bought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dyncompress.layers import list_methods


@dataclass(frozen=True)
class Arm:
    """One way.

    Attributes:
        title: What tables and plots call it.
        method: Registered name.
        options: Its options.
        allocation: How widths share the budget: "uniform", "importance", or "sensitivity", which scores classifiers.
        importance: Which channels stay.
        warm_start: Fields of `WarmStart`.
        warmup: Part of the training in which layers become dynamic.
        distill: Fields of `DistillConfig`.
        pruner: torch-pruning's ranking, where it chooses the channels; "" where we do.
    """

    title: str
    method: str = "static"
    options: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"
    importance: str = "magnitude"
    warm_start: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    distill: Mapping[str, Any] = field(default_factory=dict)
    pruner: str = ""

    @property
    def control(self) -> bool:
        """Whether it is a static network: one that dynamic ones have to beat."""
        return self.method == "static"

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^a-z0-9=]+", "-", self.title)

    @property
    def words(self) -> dict[str, Any]:
        """What it changes in a recipe."""
        nested = {f"{key}.{name}": value if isinstance(value, str) else json.dumps(value)
                  for key in ("warm_start", "distill") for name, value in getattr(self, key).items()}  # fmt: skip
        return {
            "method": self.method,
            "options": json.dumps(dict(self.options)),
            "allocation": self.allocation,
            "importance": self.importance,
            "warmup": self.warmup,
            **nested,
        }

    @property
    def terms(self) -> tuple[str, ...]:
        """All that a static arm can have as well."""
        taught = (json.dumps(dict(each), sort_keys=True) for each in (self.warm_start, self.distill))
        return (self.allocation, self.importance, *taught)


_ALL = (
    Arm("static"),
    Arm("static, by importance", allocation="importance"),
    Arm("static, ranked by taylor", importance="taylor"),
    Arm("static, by sensitivity", allocation="sensitivity"),
    Arm("torch-pruning, magnitude", pruner="magnitude"),
    Arm("torch-pruning, taylor", pruner="taylor"),
    Arm("dynet", "dynet"),
    Arm("dynet, by importance", "dynet", allocation="importance"),
    Arm("odconv, no taps", "odconv", {"spatial": False}),
    Arm("odconv, no taps, a router per block", "odconv", {"spatial": False, "router": "block"}),
    Arm("odconv, no taps, by importance", "odconv", {"spatial": False}, "importance"),
    Arm("odconv 4x", "odconv", {"kernels": 4}),
    Arm("auto", "auto"),
)
ARMS = {arm.title: arm for arm in _ALL if arm.method in list_methods()}
