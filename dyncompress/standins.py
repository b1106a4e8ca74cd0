"""Would a network's code miss what only a convolution has? A dynamic layer has no single ``weight``, for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncompress.graph import duplicate, undisturbed
from dyncompress.layers import ConvSpec, DynamicConv, TokenConv


class StandIn(DynamicConv):
    """What code sees of a dynamic layer; inside, the convolution goes on."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__(ConvSpec.of(conv))  # type: ignore[arg-type]
        self._conv = (conv,)  # no child: nobody finds it here

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in, ...) -> (B, out, ...)."""
        inner = self._conv[0]
        out: Tensor = inner(x.mT).mT if isinstance(inner, nn.Linear) else inner(x)
        return out


def _stand_in(layer: nn.Module) -> nn.Module:
    return TokenConv(StandIn(layer)) if isinstance(layer, nn.Linear) else StandIn(layer)


def missed(net: nn.Module, convs: Sequence[str], args: Any, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Layers that the network's code needs as they are, found by halving the suspects.

    Args:
        net: The network.
        convs: Paths of the convolutions and linear layers that would become dynamic.
        args: What its ``forward`` takes.
        kwargs: Likewise.

    Returns:
        What the code said, by the path of the layer.
    """
    found: dict[str, str] = {}

    def failure(names: Sequence[str]) -> str:
        trial = duplicate(net, share=True)
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(trial.get_submodule(parent), child, _stand_in(trial.get_submodule(name)))
        try:
            with undisturbed():
                torch.backends.mha.set_fastpath_enabled(True)  # reads weights that other paths leave to their layers
                trial(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the network's own code raises is the finding
            return f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return ""

    def search(names: Sequence[str]) -> None:
        left = [n for n in names if n not in found]
        said = failure(left) if left else ""
        if said and len(left) == 1:
            found[left[0]] = said
        elif said:
            search(left[: len(left) // 2])
            search(left[len(left) // 2 :])

    search(convs)
    return found
