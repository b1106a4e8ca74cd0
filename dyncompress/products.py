"""Ops that multiply channels with weights, or with each other: what they contract is tied, what they write is new."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dyncompress.labels import Maps, core, varies
from dyncompress.propagation import Call
from dyncompress.recording import Operation
from dyncompress.sites import Way


def convolution(call: Call) -> Maps:
    """The weight owns its input and output channels; the input's labels are tied to the former. Groups stay equal."""
    mode, ledger = call.mode, call.mode.ledger
    x, w, bias, groups, transposed = (call.arg(a) for a in ("input", "weight", "bias", "groups", "transposed"))
    out = call.first_out
    first, second = mode.ids(w, 0), mode.ids(w, 1)
    for m in mode.maps(w):
        if min(varies(m), default=0) >= 2:
            ledger.pin(core(m), "kernel elements are never cut")
    for m in mode.maps(x):
        if 1 not in varies(m):
            ledger.pin(core(m), mode.at("convolution over a labelled dimension"))
    entering = mode.ids(x, 1)
    reason = mode.at("reads channels that can't be cut")
    per_group = x.shape[1] // groups
    depthwise = groups > 1 and per_group == 1 and not mode.was_wide(w, 1)
    if transposed:
        ledger.tie(entering, first, reason)
        leaving = second.repeat(groups)
        if groups > 1:
            ledger.tie(entering.view(groups, -1), entering.view(groups, -1)[:1], reason)
    else:
        if depthwise:
            mode.site(call, entering, [(groups, entering)], [Way()], free=True)
            if not first.any() and not (w != w[:1]).any():  # a fixed filter, the same for every channel
                first = entering.repeat_interleave(len(first) // groups)
            ledger.tie(first.view(groups, -1), entering.view(groups, 1), reason)
        else:
            if per_group > 1 or groups == 1:  # one channel a group has no label: a cut left just that
                ledger.tie(entering.view(groups, per_group), second.view(1, per_group), reason)
            if groups > 1:
                ledger.tie(first.view(groups, -1), first.view(groups, -1)[:1], reason)
        leaving = first
    if bias is not None:
        ledger.tie(mode.ids(bias, 0), leaving, reason)
    positions = math.prod((x if transposed else out).shape[2:])
    fixed = x.shape[0] * positions * math.prod(w.shape[2:])
    kind = "conv_transpose" if transposed else "conv"
    axes = tuple(a for a, size in ((first, w.shape[0]), (second, w.shape[1])) if size > 1)
    mode.operation(Operation(mode.module, kind, mode.name_of(w), fixed, axes, x.shape[0], leaving, positions))
    mode.convolved[id(out)] = mode.module
    return (leaving.view([1, -1] + [1] * (out.dim() - 2)).expand(out.shape),)


def matmul(call: Call) -> Maps:
    """mm, bmm, addmm, baddbmm, mv: contracted channels are tied, the others pass on."""
    mode, ledger = call.mode, call.mode.ledger
    a, b = call.tensors[-2:]
    out = call.first_out
    reason = mode.at("meets features that can't be cut")
    if b.dim() == 1:  # a matrix and a vector
        ledger.tie(mode.ids(a, 1), mode.ids(b, 0), reason)
        return tuple(m.select(-1, 0) for m in mode.maps(a) if 1 not in varies(m))
    left, right = mode.maps(a), mode.maps(b)
    over_a = [m for m in left if m.dim() - 1 in varies(m)]
    over_b = [m for m in right if m.dim() - 2 in varies(m)]
    rows = [m for m in left if m.dim() - 1 not in varies(m)]
    columns = [m for m in right if m.dim() - 2 not in varies(m)]
    inner: list[Tensor] = []
    if over_a and over_b:
        for m in over_a:
            for n in over_b:
                p, q = m.select(-2, 0), n.select(-1, 0)
                a_inner, b_inner = torch.broadcast_tensors(p, q)
                ledger.tie_maps(a_inner, b_inner, reason)
        inner = over_a
    else:
        for m in [*over_a, *over_b]:
            ledger.pin(core(m), reason)
        inner = over_a or over_b
    passed = [m.select(-1, 0).unsqueeze(-1).expand(out.shape) for m in rows]
    passed += [m.select(-2, 0).unsqueeze(-2).expand(out.shape) for m in columns]
    added = [m.expand(out.shape) for m in mode.maps(call.tensors[0])] if len(call.tensors) == 3 else []
    passed = mode.merged([passed[: len(rows)], passed[len(rows) :], added], reason)  # both sides may have heads
    axes = (*_axes(inner), *_axes(passed))
    total = out.numel() * a.shape[-1]
    name = mode.name_of(b) or mode.name_of(a)
    fixed = total // math.prod(len(x) for x in axes)
    writes = core(columns[0]) if columns and name else None
    images, positions = _tokens(mode.inputs()) if isinstance(mode.running, nn.Linear) else (1, 0)
    mode.operation(Operation(mode.module, "matmul", name, fixed, axes, images, writes, positions))
    return tuple(passed)


def _tokens(inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Images, and positions in each, that a linear layer reads: its first dimension, and those up to the last."""
    shapes = [tuple(t.shape) for t in inputs if t.dim() > 1]
    return (shapes[0][0], math.prod(shapes[0][1:-1])) if len(shapes) == 1 else (1, 0)


def _axes(maps: Sequence[Tensor]) -> list[Tensor]:
    """Labels that a cost is proportional to.

    Several maps along one dimension are factors of it (a flattened kernel has input channels and kernel elements);
    each then counts by its own channels, and what is left is constant.
    """
    dims = [set(varies(m)) for m in maps]
    alone = [not any(dims[i] & other for k, other in enumerate(dims) if k != i) for i in range(len(maps))]
    return [core(m) if single else m.unique() for m, single in zip(maps, alone, strict=True)]


def attention(call: Call) -> tuple[Maps, ...]:
    """Fused attention: queries meet keys, values pass. (B, heads, tokens, width)."""
    mode, out = call.mode, call.first_out
    q, k, v = call.tensors[:3]
    reason = mode.at("meets features that can't be cut")
    mode.ledger.tie(mode.ids(q, 3), mode.ids(k, 3), reason)
    fixed = out.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    for width, meets in ((mode.ids(q, 3), q), (mode.ids(v, 3), v)):
        labelled = len(width) if bool((width != 0).any()) else 1
        axes = (width,) if labelled > 1 else ()
        mode.operation(Operation(mode.module, "matmul", "", fixed * meets.shape[3] // labelled, axes))
    for m in (m for t in (q, k, v) for m in mode.maps(t) if 2 in varies(m)):
        mode.ledger.pin(core(m), mode.at("attention over a labelled dimension"))
    if call.arg("scale") is None:
        mode.rescale(mode.ids(q, 3), "scaled dot product attention, scaled by its width")
    heads = [[m[..., :1, :1].expand(out.shape) for m in mode.maps(t) if 1 in varies(m) and 3 not in varies(m)]
             for t in (q, k)]  # fmt: skip
    values = [m[..., :1, :].expand(out.shape) for m in mode.maps(v) if 2 not in varies(m)]
    maps = tuple(mode.merged([values, *heads], reason))
    return (maps, *[() for _ in tree_leaves(call.out)[1:]])


def recurrent(call: Call) -> Maps:
    """An LSTM in one op: what enters can be cut, its state can't."""
    mode = call.mode
    x, weight, *rest = call.tensors
    mode.ledger.tie(mode.ids(x, x.dim() - 1), mode.ids(weight, 1), mode.at("reads channels that can't be cut"))
    mode.ledger.pin(mode.ids(weight, 0), mode.at("state of a recurrent layer"))
    mode.pin(rest, mode.at("state of a recurrent layer"))
    return ()


def dot(call: Call) -> Maps:
    """A product of two vectors."""
    a, b = (call.mode.ids(t, 0) for t in call.tensors)
    call.mode.rescale(a, call.name)
    call.mode.ledger.tie(a, b, call.mode.at("meets features that can't be cut"))
    return ()


def weight_norm(call: Call) -> tuple[Maps, ...]:
    """``v`` scaled to the norms ``g``."""
    v, g = call.tensors
    for m in call.mode.maps(v):
        call.mode.rescale(core(m), "weight norm")
    dim = call.arg("dim", 0)
    call.mode.ledger.tie(
        call.mode.ids(v, dim), call.mode.ids(g, dim), call.mode.at("scales channels that can't be cut")
    )
    return call.mode.maps(v), call.mode.maps(g)


def embedding(call: Call) -> Maps:
    """Rows are chosen by number, features pass."""
    weight, out = call.tensors[0], call.first_out
    call.mode.ledger.pin(call.mode.ids(weight, 0), call.mode.at("rows of an embedding"))
    return (call.mode.ids(weight, 1).expand(out.shape),)


def unfold(call: Call) -> Maps:
    """Patches of a map, (B, C, H, W) -> (B, C * k * k, positions): each channel occupies k * k rows."""
    source, out = call.tensors[0], call.first_out
    ids = call.mode.ids(source, 1)
    return (ids.repeat_interleave(out.shape[1] // len(ids)).view(1, -1, 1).expand(out.shape),)


def fold(call: Call) -> Maps:
    """The reverse: rows of one channel share its fate."""
    source, out = call.tensors[0], call.first_out
    rows = call.mode.ids(source, 1).view(out.shape[1], -1)
    call.mode.ledger.tie(rows, rows[:, :1], call.mode.at("rows of one channel"))
    return (rows[:, 0].view([1, -1] + [1] * (out.dim() - 2)).expand(out.shape),)
