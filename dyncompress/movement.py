"""Ops that only move data: each runs itself on the labels, so that index maps are exact by construction.

What depends on a number of channels written into the code (a split, a slice, a padding) is tied or pinned beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyncompress.labels import Maps, core, varies
from dyncompress.propagation import Call


def move(call: Call) -> Maps | tuple[Maps, ...]:
    """Run the op itself on the labels, map by map."""
    maps = [call.mode.maps(t) for t in call.tensors]
    count = max(len(m) for m in maps)
    if any(len(m) not in (0, count) for m in maps) or (count > 1 and len(call.tensors) > 1):
        call.mode.pin(call.tensors, call.mode.at(f"{call.name} of tensors labelled in different dimensions"))
        return ()
    results = []
    for i in range(count):
        replaced = iter([m[i] if m else _unlabelled(t) for t, m in zip(call.tensors, maps, strict=True)])
        results.append(_apply(call, lambda _: next(replaced)))  # noqa: B023 - called before the next turn
    if isinstance(results[0], (list, tuple)):
        return tuple(tuple(r[k] for r in results) for k in range(len(results[0])))
    return tuple(results)


def _unlabelled(t: Tensor) -> Tensor:
    """Labels of a tensor that has none: fixed. An index or a mask goes on as what it is."""
    return torch.zeros(t.shape, dtype=torch.int64) if t.is_floating_point() else t.cpu()


def _apply(call: Call, swap: Callable[[Tensor], Tensor]) -> Any:
    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return swap(value)
        return type(value)(walk(v) for v in value) if isinstance(value, (list, tuple)) else value

    args, kwargs = walk(list(call.args)), {k: walk(v) for k, v in call.kwargs.items()}
    return call.func(*args, **kwargs)


def view(call: Call) -> Maps:
    """A reshape.

    Where one labelled dimension is split in several, all but the innermost keep their size: the same inner positions
    are cut in each of them.
    """
    source, out = call.tensors[0], call.first_out
    results = []
    for m in call.mode.maps(source):
        new = m.reshape(out.shape)
        for inside, outside in _factor(source.shape, out.shape):
            split = [d for d in outside if out.shape[d] > 1]
            if len(split) > 1 and any(d in varies(m) for d in inside):
                for d in split[:-1]:
                    call.mode.ledger.tie_maps(new, new.narrow(d, 0, 1).expand(new.shape), call.name)
        results.append(new)
    return tuple(results)


def _factor(before: torch.Size, after: torch.Size) -> list[tuple[list[int], list[int]]]:
    """Match runs of dimensions of equal product: (2, 12) and (2, 3, 4) give ([0], [0]), ([1], [1, 2])."""
    pairs, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        left, right, a, b = [i], [j], before[i], after[j]
        while a != b:
            if a < b and i + 1 < len(before):
                i, a = i + 1, a * before[i + 1]
                left.append(i)
            elif j + 1 < len(after):
                j, b = j + 1, b * after[j + 1]
                right.append(j)
            else:
                break
        pairs.append((left, right))
        i, j = i + 1, j + 1
    return pairs


def split(call: Call) -> tuple[Maps, ...]:
    """Equal pieces of a split stay equal; unequal pieces can't follow a cut."""
    pieces = move(call)
    dim = call.arg("dim", 0) % call.tensors[0].dim()
    for i, m in enumerate(call.mode.maps(call.tensors[0])):
        if dim not in varies(m):
            continue
        parts = [piece[i] for piece in pieces]
        if len({p.shape[dim] for p in parts}) > 1:
            call.mode.ledger.require_uniform(core(m), call.mode.at("channels split in unequal pieces"))
            continue
        for part in parts[1:]:
            call.mode.ledger.tie_maps(parts[0], part, call.name)
    return pieces  # type: ignore[return-value]


def pick(call: Call) -> Maps | tuple[Maps, ...]:
    """Slices and indices count channels: they follow a cut only along a dimension that isn't cut."""
    result = move(call)
    source = call.tensors[0]
    dim = call.arg("dim")
    dims = [dim % source.dim()] if isinstance(dim, int) else range(source.dim())
    for m in call.mode.maps(source):
        for d in dims:
            if d in varies(m) and (call.first_out.shape != source.shape or call.name in ("roll", "index")):
                for row in m.movedim(d, -1).reshape(-1, m.shape[d]).unique(dim=0):
                    call.mode.ledger.require_uniform(row, call.mode.at(f"channels picked by number ({call.name})"))
    return result


def pad(call: Call) -> Maps:
    """Padding of channels makes new ones; padding of positions doesn't."""
    source, out, results = call.tensors[0], call.first_out, []
    amounts = call.arg("pad")
    for m in call.mode.maps(source):
        for d in range(source.dim()):
            k = 2 * (source.dim() - 1 - d)
            left, right = (amounts[k], amounts[k + 1]) if k < len(amounts) else (0, 0)
            if (left, right) == (0, 0):
                continue
            if d not in varies(m):
                size = list(m.shape)
                size[d] = out.shape[d]
                m = m.narrow(d, 0, 1).expand(size)
                continue
            if min(left, right) < 0:
                call.mode.ledger.pin(core(m), call.mode.at("channels cropped by a negative padding"))
            new = call.mode.ledger.fresh(max(left, 0) + max(right, 0))
            call.mode.made(new)
            edge = list(m.shape)
            edge[d] = 1
            column = [-1 if i == d else 1 for i in range(m.dim())]
            kept = m.narrow(d, max(-left, 0), m.shape[d] + min(left, 0) + min(right, 0))
            sides = []
            for ids in (new[: max(left, 0)], new[max(left, 0) :]):
                edge[d] = len(ids)
                sides.append(ids.view(column).expand(edge))
            m = torch.cat([sides[0], kept, sides[1]], d)
        results.append(m)
    return tuple(results)
