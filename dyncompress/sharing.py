"""Which layers of a network are built together."""

from __future__ import annotations

import math

from dyncompress.graph import Operation
from dyncompress.layers import Method, Static

__all__ = ["share_of"]


def share_of(op: Operation, method: Method) -> str:
    """Name of what a layer shares with others under a method; "" where it is built alone.

    A block is a residual block of the network. A stage is all layers that read maps of about one size (to a factor of
    two in every dimension): a strided layer at the start of a stage of ResNet so belongs to the stage before, as in
    KernelWarehouse (arXiv 2406.07879), whose width its input has. Depthwise layers, whose kernels are one channel deep,
    share with each other, and so do the linear layers of a transformer, which read one number of tokens. A layer that
    runs more than once is alone.

    Args:
        op: A layer that a method can replace.
        method: Its method.
    """
    if isinstance(method, Static) or method.sharing == "layer":
        return ""
    if method.sharing == "block":
        return op.block
    if op.spec is None or len(op.runs) > 1 or op.runs[0][1] > 1:
        return ""
    read = op.positions * math.prod(op.spec.stride)
    kind = "depthwise" if op.spec.is_depthwise else "tokens" if op.kind == "linear" else f"{op.spec.ndim}d"
    return f"stage {2 ** round(math.log2(read) / op.spec.ndim)}, {kind}"
