"""Which layers of a network share a warehouse in the networks of KernelWarehouse's authors (arXiv 2406.07879).

By stage. A stage's first layers still read the stage before and belong to it: the first convolution of its first block
and the shortcut beside it, or its first inverted bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator

from dyncompress.graph import ConvGraph, Operation
from dyncompress.roles import inverted, roles

__all__ = ["warehouses", "warehouses_apart", "warehouses_behind"]


def warehouses(graph: ConvGraph) -> dict[str, str]:
    """Names of warehouses by the modules that have one; the authors leave the others static.

    In ResNets all layers of a stage share. In MobileNets, and in networks of linear layers such as ConvNeXt, those that
    are depthwise share with each other, the pointwise or linear ones with each other, and any other has its own.
    """
    role = roles(graph)
    if "linear" in role.values():
        return dict(_by_map(graph, role))
    return dict(_by_width(graph, role, apart=False) if inverted(graph) else _by_block(graph, role))


def warehouses_apart(graph: ConvGraph) -> dict[str, str]:
    """The same for MobileNets whose convolutions before and after the depthwise one don't share."""
    return dict(_by_width(graph, roles(graph), apart=True))


def warehouses_behind(graph: ConvGraph) -> dict[str, str]:
    """Of MobileNets with half the parameters: of pointwise layers only those of the last stage, and the classifier."""
    found = warehouses_apart(graph)
    last = f"stage {max(int(name.split()[1].strip(',')) for name in found.values() if name.startswith('stage'))},"
    return {
        module: name
        for module, name in found.items()
        if name.startswith(last) or name.endswith("depthwise") or name in ("stem", "classifier")
    }


Named = Iterator[tuple[str, str]]


def _by_block(graph: ConvGraph, role: dict[str, str]) -> Named:
    """ResNets: a stage is all residual blocks that write maps of one size."""
    blocks: dict[str, list[Operation]] = {}
    for op in graph.convs:
        if role[op.module] in ("block", "shortcut"):
            blocks.setdefault(op.block, []).append(op)
    stage, before = -1, 0
    for inside in blocks.values():
        written = min(op.positions for op in inside)
        starts, before = written != before, written
        stage += starts
        for op in inside:
            assert op.spec is not None
            enters = starts and (op is inside[0] or role[op.module] == "shortcut")
            if enters and stage == 0 and max(op.spec.kernel_size) == 1:
                continue  # would be of a stage before the first
            yield op.module, f"stage {max(stage - enters, 0)}"


def _by_width(graph: ConvGraph, role: dict[str, str], *, apart: bool) -> Named:
    """MobileNets: a stage is all inverted bottlenecks that read one width at one size; the first joins the second."""
    chains = inverted(graph)
    stages: dict[tuple[int, int], int] = {}
    before, after = ("before", "after") if apart else ("pointwise", "pointwise")
    for chain in chains[1:]:
        stages.setdefault(_reads(chain.members[0]), len(stages))
    for index, chain in enumerate(chains):
        stage = stages[_reads(chain.members[0])] if index else 0
        for op in chain.members:
            part = "depthwise" if op is chain.depthwise else after if op is chain.project else before
            yield op.module, f"stage {stage}, {part}"
    for op in graph.convs:
        if role[op.module] == "last":
            yield op.module, f"stage {len(stages) - 1}, {after}"
        elif role[op.module] in ("stem", "classifier"):
            yield op.module, role[op.module]


def _by_map(graph: ConvGraph, role: dict[str, str]) -> Named:
    """Networks of linear layers: a stage is what runs on maps of one size."""
    for op in graph.convs:
        assert op.spec is not None
        if op.spec.is_depthwise or role[op.module] == "linear":
            yield op.module, f"stage {op.positions}, {'depthwise' if op.spec.is_depthwise else 'linear'}"
        elif role[op.module] in ("stem", "other"):
            yield op.module, op.module


def _reads(op: Operation) -> tuple[int, int]:
    assert op.spec is not None
    return op.spec.in_channels, op.positions
