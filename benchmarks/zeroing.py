"""Zeroing equivalence: the cut network computes what the original does when nothing reads the cut channels.

It proves the index maps, which shapes, forward and backward passes don't. It holds exactly where no operation looks at
several channels at once but through a weight: that is, where BatchNorm is the only norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.checks import TOLERANCE, distance, run
from dyncompress.conversion import narrowed
from dyncompress.narrowing import length, positions
from dyncompress.plan import Plan

Read = Mapping[str, Sequence[int]]

_BANKS = ("CondConv2d",)  # their kernels are mixed from parameters that no layer reads by itself
_MIXING = (
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
    "linalg_vector_norm",
    "var_mean",
    "scaled_dot_product",
)


def exempt(net: nn.Module, plan: Plan, example: Any) -> str:
    """Why zeroing proves nothing on this network; '' where it does."""
    if plan.graph.rescaled:
        return plan.graph.rescaled[0]
    for name, module in net.named_modules():
        kind = type(module).__name__
        if any(True for _ in module.children()):
            continue
        if "Norm" in kind and "BatchNorm" not in kind and not isinstance(module, _BatchNorm):
            return f"{kind} in {name}"
        if kind in _BANKS:
            return f"the kernels of {name} are mixed from a bank"
        if "parametrizations" in name or hasattr(module, "weight_g"):
            return f"the weight of {name} is computed from all channels"
    ops = _Ops()
    with ops:
        run(net, example)
    found = next((op for op in ops.seen for mixing in _MIXING if op.startswith(mixing)), "")
    return f"{found} looks at all channels" if found else ""


class _Ops(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen[func.overloadpacket.__name__] = None
        return func(*args, **(kwargs or {}))


def zeroed(net: nn.Module, plan: Plan, read: Read) -> nn.Module:
    """The original with zeros in every weight that reads a channel which the plan cuts."""
    graph, copy = plan.graph, deepcopy(net)
    tensors = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    readers = {op.weight: (0 if op.kind == "conv_transpose" else 1,) for op in graph.operations if op.weight}
    with torch.no_grad():
        for name, dims in {**readers, **read}.items():
            for dim in dims:
                runs = graph.axes.get(f"{name}:{dim}")
                if runs is not None:
                    stay = set(positions(runs, plan.keep))  # type: ignore[arg-type]
                    gone = [i for i in range(length(runs)) if i not in stay]
                    tensors[name].index_fill_(dim, torch.tensor(gone, dtype=torch.int64), 0)
    return copy


def read_by_weights(plan: Plan) -> Plan:
    """The plan without cuts that no weight reads: queries and keys meet each other, and nothing there can be zeroed."""
    met = {group for op in plan.graph.operations if not op.weight for _, parts in op.axes for group, _ in parts}
    whole = [tuple(range(group.channels)) for group in plan.graph.groups]
    return dataclasses.replace(plan, keep=tuple(whole[g] if g in met else k for g, k in enumerate(plan.keep)))


def equivalence(net: nn.Module, plan: Plan, example: Any, read: Read) -> dict[str, Any]:
    """Distance of the cut network from the zeroed one, in double precision where the network runs in it.

    Args:
        net: The original.
        plan: A plan with its channels named, as a student carries it.
        example: Its input.
        read: Parameters that aren't the weight of an operation, or are read along other dimensions than it.

    Returns:
        ``distance``, ``control`` (how far zeroing moves the output of the original), and ``wrong``: what is; 'n/a'
        and why where the check shows nothing; '' otherwise.
    """
    plan = read_by_weights(plan)
    try:
        wide = nn.Module.double(deepcopy(net))
        inputs = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example)
        original = run(wide, inputs)
    except (RuntimeError, TypeError):  # single precision is written into its code
        wide, inputs = net, example
        original = run(wide, inputs)
    reference = run(zeroed(wide, plan, read), inputs)
    off = distance(run(narrowed(wide, plan), inputs), reference)
    control = distance(original, reference)
    wrong = ""
    if off >= TOLERANCE:
        wrong = f"the cut network is {off:.1e} from the zeroed one"
    elif control < 10 * TOLERANCE and plan.widths != [g.channels for g in plan.graph.groups]:
        wrong = f"n/a: zeroing moves the output by {control:.1e} only, so the check shows nothing"
    return {"distance": off, "control": control, "wrong": wrong}
