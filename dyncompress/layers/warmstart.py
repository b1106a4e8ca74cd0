"""What the kernels of a bank are when training starts from a static convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["atoms"]

# Noise on the atoms, in units of the rms of the static weight: equal atoms would stay equal for ever.
_ATOM_NOISE = 0.2


def atoms(weight: Tensor, spare: Tensor | None, count: int, generator: torch.Generator | None) -> Tensor:
    """Nearest spare filters of each filter, and a little noise: [out, count, in / groups, *kernel]."""
    found = weight.unsqueeze(1).expand(-1, count, *weight.shape[1:]).clone()
    filters = weight.flatten(1)
    if spare is not None and spare.shape[0] and count:
        spares = spare.to(weight).flatten(1)
        spares = nn.functional.normalize(spares[spares.norm(dim=1) > 0])
        nearest = (nn.functional.normalize(filters) @ spares.T).topk(min(count, len(spares))).indices
        chosen = spares[nearest] * filters.norm(dim=1)[:, None, None]
        found[:, : nearest.shape[1]] = chosen.unflatten(2, weight.shape[1:])
    rms = weight.square().mean().sqrt().item() or filters.shape[1] ** -0.5
    device = generator.device if generator is not None else None
    noise = torch.randn(found.shape, generator=generator, device=device).to(found)
    return found + _ATOM_NOISE * rms * noise
