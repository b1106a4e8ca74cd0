"""What runs of a network leave behind: operations, places that count channels, labels of every weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from dyncompress.labels import Ledger, Maps
from dyncompress.sites import Site

Axis = tuple[str, int]
"""A dimension of a named parameter or buffer."""


@dataclass
class Operation:
    """One multiply-accumulate op: ``macs = fixed * prod(kept channels of each axis)``."""

    module: str  # innermost module that was running
    kind: str  # "conv", "conv_transpose" or "matmul" (a linear layer's, too)
    weight: str  # name of the parameter, "" for a product of two activations
    fixed: int  # kernel elements x positions, both sides of the batch included
    axes: tuple[Tensor, ...]  # labels of the dimensions that the cost is proportional to
    images: int = 1  # that it ran on: frames and windows of one image count
    writes: Tensor | None = None  # labels of the channels that a weight writes
    positions: int = 0  # output positions of one image; of a product, where a linear layer makes it


@dataclass
class Seam:
    """A parameter-free module that makes channels of its own (a zero-padded shortcut, say).

    Its code counts channels, so a cut network must show it the original ones: see `narrowing.Reindex`.
    """

    entering: Tensor  # labels of the channels that enter, [C_in]
    leaving: Tensor  # labels of the channels that leave, [C_out]


@dataclass
class Recording:
    """What the runs of a network left behind."""

    ledger: Ledger
    axes: dict[Axis, Tensor]
    operations: list[Operation] = field(default_factory=list)
    consumed: list[list[Maps]] = field(default_factory=list)  # of every product, labels of what it reads
    sites: list[Site] = field(default_factory=list)
    taken: dict[tuple[str, int, int], int] = field(default_factory=dict)  # module, call, turn -> way, -1 for none
    rescaled: list[tuple[Tensor, str]] = field(default_factory=list)  # labels whose number a result depends on
    seams: dict[str, Seam] = field(default_factory=dict)
    residual_modules: set[str] = field(default_factory=set)
    norms: dict[str, str] = field(default_factory=dict)  # convolution -> the BatchNorm that alone reads it
    calls: Counter[str] = field(default_factory=Counter)
