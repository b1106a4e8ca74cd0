"""Ops that only move data: each runs itself on the labels, so that index maps are exact by construction.

What depends on a number of channels written into the code (a split, a slice, a padding) is tied or pinned beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyncompress.labels import Maps, compact, core, cores, varies
from dyncompress.propagation import Call
from dyncompress.sites import Pair, Way, alike


def move(call: Call) -> Maps | tuple[Maps, ...]:
    """Run the op itself on the labels, map by map."""
    maps = [call.mode.maps(t) for t in call.tensors]
    together = [(m,) for m in maps[0]] if len(call.tensors) == 1 else _aligned(call, maps)
    results = []
    for row in together:
        replaced = iter(row)
        results.append(_apply(call, lambda _: next(replaced)))  # noqa: B023 - called before the next turn
    if results and isinstance(results[0], (list, tuple)):
        return tuple(tuple(r[k] for r in results) for k in range(len(results[0])))
    return tuple(results)


def join(call: Call) -> Maps:
    """cat, stack: pieces that lie side by side share the channels of every other dimension."""
    mode, out = call.mode, call.first_out
    dim = call.arg("dim", 0) % out.dim()
    together = _aligned(call, [mode.maps(t) for t in call.tensors])
    results = []
    for row in together:
        if call.name == "stack":
            row = tuple(m.unsqueeze(dim) for m in row)
        labelled = [m for m in row if varies(m)]
        if any(dim in varies(m) for m in labelled):
            results.append(torch.cat(row, dim))
            continue
        first, *others = [m.narrow(dim, 0, 1) for m in labelled]
        for other in others:
            mode.ledger.tie_maps(first, other, mode.at("joined with channels that can't be cut"))
        results.append(first.expand(out.shape))
    return tuple(results)


def _aligned(call: Call, maps: Sequence[Maps]) -> list[tuple[Tensor, ...]]:
    """Maps of several tensors that go together: those that change along the same dimensions."""
    kinds: dict[tuple[int, ...], dict[int, Tensor]] = {}
    for i, found in enumerate(maps):
        for m in found:
            kind = tuple(varies(m))
            wider = next((k for k in kinds if set(k) & set(kind) and i not in kinds[k]), kind)
            if i in kinds.setdefault(wider, {}):
                call.mode.pin([call.tensors[i]], call.mode.at(f"{call.name} of tensors labelled in several ways"))
                return []
            kinds[wider][i] = m
    return [tuple(row[i] if i in row else _unlabelled(t) for i, t in enumerate(call.tensors)) for row in kinds.values()]


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

    Where one labelled dimension is split in several, one of them is cut and the others keep their size: the innermost
    (the same inner positions go in each of the outer ones), else one further out. A size that is written down may
    live in an attribute, or come from the shape of what the module was given.
    """
    source, out = call.tensors[0], call.first_out
    sizes = call.arg("size") or call.arg("shape") or list(out.shape)
    results = []
    for m in call.mode.maps(source):
        new = compact(m.reshape(out.shape))
        for inside, outside in _factor(source.shape, out.shape):
            across = [d for d in outside if d in varies(new)]
            if len(across) > 1 and sum(d in varies(m) for d in inside) == 1:
                new = _split_view(call, m, new, inside, across)
            elif len(across) == 1 and sizes[across[0]] != -1 and out.dim() > 1:
                _merge_view(call, new, across[0])
        results.append(new)
    return tuple(results)


def _split_view(call: Call, before: Tensor, after: Tensor, inside: list[int], across: list[int]) -> Tensor:
    """One labelled dimension becomes several, of which one is cut: the labels then change along that one alone."""
    (along,) = [d for d in inside if d in varies(before)]
    row = call.mode.row(before, along)

    def cutting(d: int) -> tuple[Pair, ...]:
        others = [after.narrow(k, 0, 1).expand(after.shape) for k in across if k != d]
        return tuple((left, right) for left, right in (cores(after, other) for other in others))

    order = across if before.dim() == 2 else across[::-1]  # a feature vector becomes a map; a stream becomes heads
    first = order[0]
    ways, cut = [Way(cutting(first))], [first]
    for other in _sources(call, len(row)):
        ways.append(Way((*ways[0].ties, (row.view(-1, len(other)), other))))
        cut.append(first)
    for d in order[1:]:
        ways.append(Way(cutting(d)))
        cut.append(d)
    taken = call.mode.site(call, core(before), [(after.shape[first], call.mode.row(after, first))], ways, free=False)
    for k in across if taken >= 0 else ():
        if k != cut[taken]:
            after = after.narrow(k, 0, 1).expand(after.shape)
    return after


def _merge_view(call: Call, after: Tensor, d: int) -> None:
    """Several dimensions become one labelled one, or one keeps its size: the size may be written down."""
    row = call.mode.row(after, d)
    ways = [Way(), *(Way(((row, other),)) for other in call.mode.entering(len(row)))]
    call.mode.site(call, core(after), [(len(row), row)], ways, free=True)


def _sources(call: Call, size: int) -> list[Tensor]:
    """Channels that entered the running module, as many as ``size`` or a fraction of it."""
    sizes = {t.shape[d] for t in call.mode.inputs() for d in range(1, t.dim())}
    return [ids for n in sorted(sizes, reverse=True) if n > 1 and size % n == 0 for ids in call.mode.entering(n)]


def _rows(labels: Tensor, d: int) -> Tensor:
    """Labels along one dimension (the last of the result), at every position at which they differ."""
    rows = labels.movedim(d, -1)
    return rows[tuple(slice(None) if k in varies(rows) else 0 for k in range(rows.dim()))]


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
    """Equal pieces of a split stay equal; unequal ones are kept in proportion, unless attributes hold their sizes."""
    pieces = move(call)
    dim = call.arg("dim", 0) % call.tensors[0].dim()
    for i, m in enumerate(call.mode.maps(call.tensors[0])):
        if dim not in varies(m):
            continue
        rows = [call.mode.row(piece[i], dim) for piece in pieces]
        numbers = [(len(r), r) for r in rows]
        if len({len(r) for r in rows}) == 1:
            ties = tuple((rows[0], r) for r in rows[1:])
            call.mode.site(call, core(m), numbers, [Way(ties)], free=False)
            continue
        ends = [sum(len(r) for r in rows[: k + 1]) for k in range(len(rows) - 1)]
        units = alike(_rows(m, dim), ends)
        call.mode.site(call, core(m), numbers, [Way(units)] if units else [], free=True)
    return pieces  # type: ignore[return-value]


def cut_out(call: Call) -> Maps | tuple[Maps, ...]:
    """A slice of channels: its bounds are numbers, in attributes or computed from a shape."""
    result = move(call)
    source = call.tensors[0]
    dim, size = call.arg("dim", 0) % source.dim(), source.shape[call.arg("dim", 0)]
    start, step = call.arg("start") or 0, call.arg("step", 1)
    end = min(size if call.arg("end") is None else call.arg("end"), size)
    start, end = (max(0, v + size if v < 0 else v) for v in (start, end))
    for m in call.mode.maps(source):
        if dim not in varies(m) or (start, end, step) == (0, size, 1):
            continue
        row = call.mode.row(m, dim)
        numbers = [(b, row[:b]) for b in (start, end) if 0 < b < size]
        numbers += [(size - b, row[b:]) for b in (start, end) if 0 < b < size]
        ways = [
            Way(((row[:b], other),)) for b in (start, end) if 0 < b < size for other in call.mode.entering(b)
        ]  # fmt: skip
        if step > 1 and size % step == 0 and end == size and start < step:
            blocks = _rows(m, dim).unflatten(-1, (-1, step))
            ways, numbers = [Way(((blocks, blocks[..., :1]),))], []
        elif step == 1:
            units = alike(_rows(m, dim), [start, end])
            ways += [Way(units)] if units else []
        else:
            ways, numbers = [], []
        call.mode.site(call, core(m), numbers, ways, free=True)
    return result


def pick(call: Call) -> Maps | tuple[Maps, ...]:
    """Indices count channels: they follow a cut only along a dimension that isn't cut."""
    result = move(call)
    source = call.tensors[0]
    if call.name == "roll":
        dims = call.arg("dims") or range(source.dim())
    elif call.name == "index":
        dims = [d for d, index in enumerate(call.arg("indices")) if index is not None]
    else:
        dims = [call.arg("dim", 0)]
    for m in call.mode.maps(source):
        for d in {d % source.dim() for d in dims} & set(varies(m)):
            if call.first_out.shape != source.shape or call.name in ("roll", "index"):
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
