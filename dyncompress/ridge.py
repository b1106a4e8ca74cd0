"""Least squares of one layer: weights near given ones that reproduce wanted outputs best.

With patches H [in, n], wanted outputs Y [out, n], and the start W0, b0::

    W*, b* = argmin |Y - W H - b|^2 + lam |W - W0|^2 = W0 + E H^T (H H^T + lam I)^-1,    E = Y - W0 H - b0

with lam = strength * mean of the diagonal of H H^T, and H and E centred where a constant is free. At strength 0, of all
best weights, the nearest.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from dyncompress.errors import DynCompressError, shown

STRENGTH = 0.1
_CHUNK = 1 << 24  # numbers of a matrix in fp64: 128 MB
_TINY = torch.finfo(torch.float64).tiny


def check_strength(strength: object) -> None:
    """Raise unless this is a strength of the ridge."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < float("inf"):
        raise DynCompressError(f"strength {shown(strength)} is no number from 0 on; {STRENGTH} is usual")


@dataclass(frozen=True)
class Solution:
    """Fitted weights of one layer.

    Attributes:
        weight: In the shape of the start.
        shift: [out], what to add to every output; zeros where no constant is free.
        before: Sum of squared errors of the start over the wanted outputs' squared distances from their means.
        after: The same of the solution.
    """

    weight: Tensor
    shift: Tensor
    before: float
    after: float


class Problem:
    """Normal equations of one layer, group by group, in fp64.

    Args:
        weight: [out, in / groups, *kernel], the start.
        bias: [out], or None for zeros.
        groups: Of the convolution; 1 for a linear layer.
        centred: Whether a constant per output channel is free.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: int, centred: bool) -> None:
        device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")  # not all know fp64
        self.size, self.centred = weight.shape, centred
        self.start = weight.detach().to(device, torch.float64).reshape(groups, len(weight) // groups, -1)
        constant = torch.zeros(len(weight)) if bias is None else bias.detach()
        self.constant = constant.to(device, torch.float64).reshape(groups, -1)
        self.count = 0
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device, dtype=torch.float64))

    def add(self, patches: Tensor, wanted: Tensor) -> None:
        """Samples: patches [groups, n, in / groups * taps], wanted [n, out]."""
        groups, outputs, inputs = self.start.shape
        wanted = wanted.unflatten(1, (groups, outputs)).transpose(0, 1)
        rows = max(1, _CHUNK // (groups * max(inputs, outputs)))
        for patch, value in zip(patches.split(rows, 1), wanted.split(rows, 1), strict=True):
            h, y = patch.to(self.start), value.to(self.start)
            e = y - h @ self.start.mT - self.constant.unsqueeze(1)
            new = {"hh": h.mT @ h, "eh": e.mT @ h, "h": h.sum(1), "e": e.sum(1), "ee": e.square().sum(1),
                   "y": y.sum(1), "yy": y.square().sum(1)}  # fmt: skip
            for name, part in new.items():
                self.sums[name] = self.sums[name] + part
            self.count += h.shape[1]

    def solve(self, strength: float) -> Solution:
        """The best weights on the samples that were added.

        Raises:
            DynCompressError: If a sample is NaN or infinite.
        """
        n, s = self.count, self.sums
        hh, eh, ee = s["hh"], s["eh"], s["ee"]
        h, e = s["h"] / n, s["e"] / n
        if self.centred:
            hh = hh - n * h.unsqueeze(2) * h.unsqueeze(1)
            eh = eh - n * e.unsqueeze(2) * h.unsqueeze(1)
            ee = ee - n * e.square()
        if not all(value.isfinite().all() for value in (hh, eh, ee)):
            raise DynCompressError("samples are not finite; leave out what holds NaN or infinity")
        step = _step(hh, eh, strength)
        after = ee - 2 * (step * eh).sum(2) + ((step @ hh) * step).sum(2)
        shift = e - (step @ h.unsqueeze(2)).squeeze(2) if self.centred else torch.zeros_like(e)
        scale = (s["yy"] - s["y"].square() / n).sum().clamp(min=_TINY)
        errors = [(value.clamp(min=0).sum() / scale).item() for value in (s["ee"], after)]
        return Solution((self.start + step).reshape(self.size), shift.flatten(), *errors)


def _step(hh: Tensor, eh: Tensor, strength: float) -> Tensor:
    """E H^T (H H^T + lam I)^-1 per group: [groups, out, in]."""
    size = hh.shape[1]
    lam = strength * hh.diagonal(dim1=1, dim2=2).mean(1).clamp(min=_TINY)
    if strength:
        factor, failed = torch.linalg.cholesky_ex(hh + lam[:, None, None] * torch.eye(size).to(hh))
        if not failed.any():
            solved: Tensor = torch.cholesky_solve(eh.mT, factor)
            return solved.mT
    values, vectors = torch.linalg.eigh(hh)
    # Directions that the samples do not span, to rounding, stay as they are.
    least = values.amax(1, keepdim=True).clamp(min=0) * size * torch.finfo(torch.float64).eps
    inverse = torch.where(values > least, 1 / (values + lam.unsqueeze(1)).clamp(min=_TINY), 0)
    step: Tensor = ((eh @ vectors) * inverse.unsqueeze(1)) @ vectors.mT
    return step
