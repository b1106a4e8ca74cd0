"""Which channels of a module's output a student keeps, so that it can be compared with the original's.

A plan names the channels that stay of every weight. Those of an activation follow from them: the original runs once on
one image under its channel labels (`propagation.py`), and each label of the module's output belongs to a channel of
weights that the plan cuts, or to none.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyncompress.cost import fits
from dyncompress.errors import DistillationError
from dyncompress.graph import duplicate, one_image, parameter_shapes, undisturbed
from dyncompress.labels import Maps
from dyncompress.narrowing import positions
from dyncompress.plan import Plan
from dyncompress.propagation import Propagation
from dyncompress.rules import rule_for


def kept_channels(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan, names: Collection[str]
) -> dict[str, list[tuple[int, Tensor]]]:
    """For every named module, the dimensions of its output that the plan cuts, and the channels that stay in them.

    Args:
        net: The original network, in eval mode; left as it was.
        args: What its ``forward`` takes.
        kwargs: Likewise.
        plan: What was cut, with the kept channels named.
        names: Modules.

    Raises:
        DistillationError: If the plan is not of this network, or a channel of an output is not that of one weight.

    Example:
        >>> kept_channels(net, (images,), {}, plan_of(student), ["layer2"])["layer2"]  # doctest: +SKIP
        [(1, tensor([ 0,  3,  4, 10]))]
    """
    difference = fits(plan.graph, parameter_shapes(net))
    if difference:
        raise DistillationError(
            f"hints compare a student with the network that it was narrowed from, and the teacher is another one:"
            f" {difference}; use features= (attention maps), or list the original first among the teachers"
        )
    twin = duplicate(net)
    parameter = next(twin.parameters())
    args, kwargs = one_image((args, kwargs))
    mode = _Labelled(twin, names)
    try:
        with undisturbed(), torch.autocast(parameter.device.type, enabled=False), mode:
            twin(*args, **kwargs)
    finally:
        mode.close()
    classes, _ = mode.ledger.classes()
    goes, stays = np.zeros((2, len(classes)), dtype=bool)
    kept = [k if not isinstance(k, int) else range(k) for k in plan.keep]
    for (name, dim), labels in mode.recording.axes.items():
        found = classes[labels.numpy()]
        runs = plan.graph.axes.get(f"{name}:{dim}")
        at = np.ones(len(found), dtype=bool) if runs is None else np.isin(np.arange(len(found)), positions(runs, kept))
        stays[found[at]] = goes[found[~at]] = True
    gone, unclear = torch.from_numpy(goes[classes]), torch.from_numpy((goes & stays)[classes])  # by label
    return {name: _cuts(name, mode.outputs.get(name, ()), gone, unclear) for name in names}


def _cuts(name: str, maps: Maps, gone: Tensor, unclear: Tensor) -> list[tuple[int, Tensor]]:
    """What is left of every dimension when the places are taken out that hold nothing but channels that go."""
    cuts = []
    for labels in maps:
        rest, doubtful = gone[labels], bool(unclear[labels].any())
        for dim in range(1, rest.dim()):
            stays = torch.nonzero(~rest.transpose(0, dim).flatten(1).all(dim=1)).flatten()
            if len(stays) < rest.shape[dim]:
                rest = rest.index_select(dim, stays)
                cuts.append((dim, stays))
        if doubtful or rest.any():
            raise DistillationError(
                f"hints can't tell which channels of '{name}' stay; name a module whose channels are those of one layer"
            )
    return cuts


class _Labelled(Propagation):
    """Also remembers the labels of what some modules last returned."""

    def __init__(self, net: nn.Module, names: Collection[str]) -> None:
        self.outputs: dict[str, Maps] = {}
        self._wanted = names
        super().__init__(net, rule_for)

    def left(self, name: str, inputs: Any, output: Any) -> None:
        """A module has finished."""
        super().left(name, inputs, output)
        if name in self._wanted and isinstance(output, Tensor):
            self.outputs[name] = self.maps(output)
