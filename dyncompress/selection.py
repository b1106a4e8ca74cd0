"""Layers that a person names: by path, by glob (``"layer1.*"``) or by type."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from dyncompress.cost import widths
from dyncompress.errors import PlanError, shown
from dyncompress.graph import ConvGraph, Extent, Operation, extent

Patterns = Sequence[str | type]
Floors = Mapping[str, int | float]
"""Layer name or glob -> output channels that it keeps at least (int), or their share (float)."""


def named(net: nn.Module, graph: ConvGraph, patterns: Patterns, argument: str) -> dict[str, str]:
    """The layers that patterns match, each with the pattern that matched it (the last one).

    Args:
        net: The network that the graph was traced from.
        graph: Its channel graph.
        patterns: Names, globs, or types (``nn.Conv1d`` or ``"Conv1d"``).
        argument: What they were given as, for the message.

    Raises:
        PlanError: If one matches no layer; names the nearest.
    """
    if isinstance(patterns, (str, type)):
        patterns = (patterns,)
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(isinstance(p, (str, type)) for p in patterns):
        raise PlanError(f"{argument} {shown(patterns)} are no names, globs or types of layers; give a list of them")
    names = list(dict.fromkeys(op.module for op in graph.operations if op.weight))
    types = {name: type(net.get_submodule(name)) for name in names}
    found: dict[str, str] = {}
    for pattern in patterns:
        asked = pattern if isinstance(pattern, str) else pattern.__name__
        hits = [
            name
            for name in names
            if (isinstance(pattern, type) and issubclass(types[name], pattern))
            or (isinstance(pattern, str) and (fnmatchcase(name, pattern) or pattern == types[name].__name__))
        ]
        if not hits:
            near = difflib.get_close_matches(asked[:100], [*names, *{t.__name__ for t in types.values()}], n=3)
            raise PlanError(
                f"{argument} {shown(asked)} matches no layer; give a name, a glob such as 'layer1.*', or a type"
                f" (near: {', '.join(near) or ', '.join(names[:3])})"
            )
        found |= dict.fromkeys(hits, asked)
    return found


def held(graph: ConvGraph, layers: Mapping[str, str]) -> set[int]:
    """Groups that enter or leave one of these layers."""
    return {group for op in graph.operations if op.module in layers for _, parts in op.axes for group, _ in parts}


def smallest(net: nn.Module, graph: ConvGraph, floors: Floors, min_width: int) -> list[int]:
    """Per group, the channels that it keeps at least.

    Args:
        net: The network that the graph was traced from.
        graph: Its channel graph.
        floors: Layers and what each keeps of its output channels: a number (int) or a share (float). A layer that has
            fewer keeps them all; one whose output is of several groups keeps its share of each.
        min_width: What every group keeps (a quarter of it, where that is less).

    Raises:
        PlanError: If a floor matches no layer or is no possible width of it.
    """
    full = widths(graph)
    found = [min(min_width, max(1, c // 4)) for c in full]
    if not isinstance(floors, Mapping):
        raise PlanError(f"floors {shown(floors)} are no mapping; give layers and widths, such as {{'layer4.*': 0.5}}")
    for pattern, floor in floors.items():
        _check(pattern, floor)
        layers = named(net, graph, (pattern,), "floors")
        outputs = {op.module: _output(graph, op) for op in graph.operations if op.module in layers}
        widest = max(width for width, _ in outputs.values())
        if isinstance(floor, int) and floor > widest:
            raise PlanError(
                f"floors {shown(pattern)}: {shown(floor)} channels, of layers that have {widest}; give 1 to {widest}"
            )
        for width, (fixed, parts) in outputs.values():
            share = floor if isinstance(floor, float) else (min(floor, width) - fixed) / max(width - fixed, 1)
            for g, _ in parts:
                # rounded first: 0.7 * 10 is 7.000000000000001 channels, which are not 8
                found[g] = max(found[g], math.ceil(round(share * full[g], 6)))
    return found


def _output(graph: ConvGraph, op: Operation) -> tuple[int, Extent]:
    """Output channels of a layer, and how they are made up."""
    dim = 1 if op.kind == "conv_transpose" else 0
    shape = graph.parameters.get(op.weight, ())
    runs = graph.axes.get(f"{op.weight}:{dim}")
    return (shape[dim] if dim < len(shape) else 0), (extent(runs) if runs is not None else (0, ()))


def _check(pattern: str, floor: object) -> None:
    number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
    if not number or not (floor >= 1 if isinstance(floor, int) else 0 < floor <= 1):  # type: ignore[operator]
        raise PlanError(
            f"floors {shown(pattern)}: {shown(floor)} is no width; give channels as an integer from 1, or a share of"
            " them as a float up to 1.0"
        )
