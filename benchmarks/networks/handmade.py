"""The networks of the tests: one for each way in which channels travel. The list grows with theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import causes
import networks

NETWORKS = {
    f"hand/{network.__name__}": partial(module.make, network)
    for module, listed in ((networks, networks.NETWORKS), (causes, causes.CAUSES))
    for network in listed
}
READ_ACROSS = {f"hand/{network.__name__}" for network in causes.READ_ACROSS}
"""Cutting is more than zeroing there: something other than a weight reads across channels."""


def read_otherwise(name: str) -> Mapping[str, Sequence[int]]:
    """Parameters of a network that are read otherwise than along dimension 1 of a layer's own weight."""
    from test_causes import READ

    return READ.get(name.removeprefix("hand/"), {})
