"""What each aten op does to channel labels. `rule_for` finds the rule of a call by its name and tags."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dyncompress.labels import Maps, core, varies
from dyncompress.movement import cut_out, join, move, pad, pick, split, view
from dyncompress.propagation import Call, Operation
from dyncompress.sites import Way

Rule = Callable[[Call], "Maps | tuple[Maps, ...]"]


def elementwise(call: Call) -> Maps:
    """Operands that broadcast together share their channels; what meets values that differ by channel is pinned."""
    mode, shape = call.mode, call.first_out.shape
    layers: list[tuple[int, Tensor]] = []
    for i, t in enumerate(call.tensors):
        if len(t.shape) <= len(shape):
            layers += [(i, m.expand(shape)) for m in mode.maps(t)]
    merged: list[Tensor] = []
    owners: list[set[int]] = []
    for i, m in layers:
        for k, other in enumerate(merged):
            if i not in owners[k] and set(varies(m)) & set(varies(other)):
                mode.ledger.tie_maps(m, other, mode.at(f"{call.name} with a fixed channel"))
                owners[k].add(i)
                if set(varies(m)) > set(varies(other)):
                    merged[k] = m
                break
        else:
            merged.append(m)
            owners.append({i})
    if call.name.startswith("add") and sum(not mode.name_of(t) and bool(mode.maps(t)) for t in call.tensors) > 1:
        mode.recording.residual_modules.add(mode.module)
    results = []
    for m, owner in zip(merged, owners, strict=True):
        for i, t in enumerate(call.tensors):
            apart = _differs(t, varies(m), len(shape)) if i not in owner else []
            if apart:
                why = mode.at(f"{call.name} with values that differ by channel and aren't labelled")
                m = _alike_along(call, m, apart, why)
        results.append(m)
    return tuple(results)


def _alike_along(call: Call, m: Tensor, dims: list[int], reason: str) -> Tensor:
    """A map that no longer changes along some dimensions: what is cut there is cut at every position.

    Where it changes along no other dimension, all its channels would share one fate: they are pinned.
    """
    if set(varies(m)) <= set(dims):
        call.mode.ledger.pin(core(m), reason)
        return m
    for d in dims:
        if d in varies(m):
            first = m.narrow(d, 0, 1).expand(m.shape)
            call.mode.ledger.tie_maps(m, first, reason)
            m = first
    return m


def _differs(tensor: Tensor, dims: list[int], rank: int) -> list[int]:
    """Dimensions of the result along which the values of an operand differ."""
    found = []
    for d in dims:
        own = d - (rank - tensor.dim())
        if own >= 0 and tensor.shape[own] > 1 and bool((tensor != tensor.narrow(own, 0, 1)).any()):
            found.append(d)
    return found


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
    if transposed:
        ledger.tie(entering, first, reason)
        leaving = second.repeat(groups)
        if groups > 1:
            ledger.tie(entering.view(groups, -1), entering.view(groups, -1)[:1], reason)
    else:
        leaving = first
        if groups > 1 and per_group == 1:
            mode.site(call, entering, [(groups, entering)], [Way()], free=True)
            if not first.any() and not (w != w[:1]).any():  # a fixed filter, the same for every channel
                first = entering.repeat_interleave(len(first) // groups)
            ledger.tie(first.view(groups, -1), entering.view(groups, 1), reason)
        else:
            ledger.tie(entering.view(groups, per_group), second.view(1, per_group), reason)
            if groups > 1:
                ledger.tie(first.view(groups, -1), first.view(groups, -1)[:1], reason)
    if bias is not None:
        ledger.tie(mode.ids(bias, 0), leaving, reason)
    positions = math.prod((x if transposed else out).shape[2:])
    fixed = x.shape[0] * positions * math.prod(w.shape[2:])
    kind = "conv_transpose" if transposed else "conv"
    axes = tuple(a for a, size in ((first, w.shape[0]), (second, w.shape[1])) if size > 1)
    mode.operation(Operation(mode.module, kind, mode.name_of(w), fixed, axes, leaving, positions))
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
        inner = [core(over_a[0].select(-2, 0))]
    else:
        for m in [*over_a, *over_b]:
            ledger.pin(core(m), reason)
        inner = [core(m) for m in [*over_a, *over_b]][:1]
    passed = [m.select(-1, 0).unsqueeze(-1).expand(out.shape) for m in rows]
    passed += [m.select(-2, 0).unsqueeze(-2).expand(out.shape) for m in columns]
    added = [m.expand(out.shape) for m in mode.maps(call.tensors[0])] if len(call.tensors) == 3 else []
    passed = mode.merged([passed[: len(rows)], passed[len(rows) :], added], reason)  # both sides may have heads
    axes = (*inner, *[core(m) for m in [*rows, *columns]])
    total = out.numel() * a.shape[-1]
    name = mode.name_of(b) or mode.name_of(a)
    fixed = total // math.prod(len(x) for x in axes)
    writes = core(columns[0]) if columns and name else None
    mode.operation(Operation(mode.module, "matmul", name, fixed, axes, writes))
    return tuple(passed)


def batch_norm(call: Call) -> tuple[Maps, ...]:
    """Scale, shift and statistics belong to the channels."""
    entering = call.mode.ids(call.tensors[0], 1)
    for m in call.mode.maps(call.tensors[0]):
        if set(varies(m)) - {1}:  # a weight that is standardised
            call.mode.rescale(core(m), call.name)
    conv = call.mode.convolved.get(id(call.tensors[0]))
    if conv is not None:
        call.mode.recording.norms.setdefault(conv, call.mode.module)
    for t in call.tensors[1:]:
        call.mode.ledger.tie(call.mode.ids(t, 0), entering, call.mode.at("normalises channels that can't be cut"))
    return (call.mode.maps(call.tensors[0]), (), (), (), ())


def group_norm(call: Call) -> tuple[Maps, ...]:
    """Each group keeps as many channels as the others."""
    groups, entering = call.arg("group"), call.mode.ids(call.tensors[0], 1)
    call.mode.rescale(entering, call.name)
    reason = call.mode.at("normalises channels that can't be cut")
    if groups > 1:
        call.mode.ledger.tie(entering.view(groups, -1), entering.view(groups, -1)[:1], reason)
    for t in call.tensors[1:]:
        call.mode.ledger.tie(call.mode.ids(t, 0), entering, reason)
    return (call.mode.maps(call.tensors[0]), (), ())


def layer_norm(call: Call) -> tuple[Maps, ...]:
    """An elementwise op with its weight and bias, as far as labels go; the widths are written down."""
    maps = elementwise(call)
    widths = call.arg("normalized_shape")
    for m in maps:
        for d in varies(m):
            if d >= m.dim() - len(widths):
                row = call.mode.row(m, d)
                call.mode.rescale(row, call.name)
                call.mode.site(call, core(m), [(len(row), row)], [Way()], free=True)
    return (maps, (), ())


def spatial(call: Call) -> Maps | tuple[Maps, ...]:
    """Pooling and resizing: channels pass, positions change."""
    source, out, results = call.tensors[0], call.first_out, []
    for m in call.mode.maps(source):
        if any(source.shape[d] != out.shape[d] for d in varies(m)):
            call.mode.ledger.pin(core(m), call.mode.at(f"{call.name} over a labelled dimension"))
            continue
        for d in range(m.dim()):
            if d not in varies(m):
                m = m.narrow(d, 0, 1)
        results.append(m.expand(out.shape))
    return tuple(results)


def _each(call: Call, maps: Sequence[Tensor]) -> tuple[Maps, ...]:
    """The same maps for every result of an op."""
    return tuple(tuple(maps) for t in tree_leaves(call.out) if isinstance(t, Tensor))


def reduction(call: Call) -> tuple[Maps, ...]:
    """Channels that are summed over are gone; the others pass."""
    source, results = call.tensors[0], []
    dims = call.arg("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(source.dim()))
    dims = [d % source.dim() for d in dims]
    for m in call.mode.maps(source):
        if set(varies(m)) & set(dims):
            call.mode.rescale(core(m), f"{call.name} over channels")
        if set(varies(m)) <= set(dims):
            continue
        m = _alike_along(call, m, dims, call.name)
        for d in sorted(dims, reverse=True):
            m = m.narrow(d, 0, 1) if call.arg("keepdim", False) else m.select(d, 0)
        results.append(m)
    return _each(call, results)


def along(call: Call) -> tuple[Maps, ...]:
    """softmax, cumsum, sort: every one along the dimension depends on every other."""
    dim = call.arg("dim", -1) % call.tensors[0].dim()
    shape, results = call.first_out.shape, []
    for m in call.mode.maps(call.tensors[0]):
        if dim in varies(m):
            m = _alike_along(call, m, [dim], call.mode.at(f"{call.name} across channels"))
        if m.shape != shape:  # topk keeps fewer
            m = m.narrow(dim, 0, 1).expand(shape)
        results.append(m)
    return _each(call, results)


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


def gate(call: Call) -> Maps:
    """``glu``: one half opens the other."""
    dim, results = call.arg("dim", -1) % call.tensors[0].dim(), []
    for m in call.mode.maps(call.tensors[0]):
        a, b = m.chunk(2, dim)
        if dim in varies(m):
            call.mode.ledger.tie_maps(a, b, call.name)
        results.append(a)
    return tuple(results)


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


def unpool(call: Call) -> Maps:
    """Back to where the maxima were: the channels of values and places go together."""
    values, places = call.tensors
    for m, n in zip(call.mode.maps(values), call.mode.maps(places), strict=False):
        call.mode.ledger.tie_maps(m, n, call.mode.at("meets channels that can't be cut"))
    return spatial(call)  # type: ignore[return-value]


def embedding(call: Call) -> Maps:
    """Rows are chosen by number, features pass."""
    weight, out = call.tensors[0], call.first_out
    call.mode.ledger.pin(call.mode.ids(weight, 0), call.mode.at("rows of an embedding"))
    return (call.mode.ids(weight, 1).expand(out.shape),)


def fourier(call: Call) -> Maps:
    """A transform over positions; over channels every one depends on every other."""
    source, out, results = call.tensors[0], call.first_out, []
    dims = [d % source.dim() for d in call.arg("dim")]
    for m in call.mode.maps(source):
        if set(dims) & set(varies(m)):
            call.mode.ledger.pin(core(m), call.mode.at("Fourier transform across channels"))
            continue
        for d in dims:
            m = m.narrow(d, 0, 1)
        results.append(m.expand(out.shape))
    return tuple(results)


def complex_view(call: Call) -> Maps:
    """Real and imaginary part as a last dimension, or the reverse."""
    source, out = call.tensors[0], call.first_out
    if out.dim() > source.dim():
        return tuple(m.unsqueeze(-1).expand(out.shape) for m in call.mode.maps(source))
    return tuple(m.select(-1, 0) for m in call.mode.maps(source))


def recurrent(call: Call) -> Maps:
    """An LSTM in one op: what enters can be cut, its state can't."""
    mode = call.mode
    x, weight, *rest = call.tensors
    mode.ledger.tie(mode.ids(x, x.dim() - 1), mode.ids(weight, 1), mode.at("reads channels that can't be cut"))
    mode.ledger.pin(mode.ids(weight, 0), mode.at("state of a recurrent layer"))
    mode.pin(rest, mode.at("state of a recurrent layer"))
    return ()


def weight_norm(call: Call) -> tuple[Maps, ...]:
    """``v`` scaled to the norms ``g``."""
    v, g = call.tensors
    for m in call.mode.maps(v):
        call.mode.rescale(core(m), "weight norm")
    dim = call.arg("dim", 0)
    call.mode.ledger.tie(call.mode.ids(v, dim), call.mode.ids(g, dim), call.mode.at("scales channels that can't be cut"))
    return call.mode.maps(v), call.mode.maps(g)


def dot(call: Call) -> Maps:
    """A product of two vectors."""
    a, b = (call.mode.ids(t, 0) for t in call.tensors)
    call.mode.rescale(a, call.name)
    call.mode.ledger.tie(a, b, call.mode.at("meets features that can't be cut"))
    return ()


def same(call: Call) -> Maps:
    """The result has the labels of the first tensor."""
    return call.mode.maps(call.tensors[0])


def restride(call: Call) -> Maps:
    """``as_strided_`` that keeps the shape (pooling to 1x1 in channels-last order); any other is unknown."""
    maps = call.mode.maps(call.tensors[0])
    if any(tuple(call.arg("size")) != tuple(m.shape) for m in maps):
        call.mode.pin(call.tensors, call.mode.at(f"no rule for {call.name}"))
        return ()
    return maps


def copy(call: Call) -> Maps:
    """``y.copy_(x)``; through a view of an unlabelled tensor the labels would be lost, so they are pinned."""
    target, source = call.tensors[0], call.tensors[-1]
    maps = tuple(m.expand(target.shape) for m in call.mode.maps(source))
    call.mode.write(target, maps)
    return maps


def _names(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_names(move, "permute transpose t transpose_ t_ expand clone detach alias _to_copy contiguous squeeze"
             " squeeze_ unsqueeze unsqueeze_ flip repeat pixel_shuffle pixel_unshuffle channel_shuffle lift_fresh"
             " native_channel_shuffle mT T movedim"),
    **_names(join, "cat stack"),
    **_names(view, "view _unsafe_view reshape _reshape_alias view_copy"),
    **_names(split, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
    "slice": cut_out,
    **_names(pick, "select index index_select roll unbind"),
    "constant_pad_nd": pad,
    "convolution": convolution,
    **_names(matmul, "mm bmm addmm baddbmm mv"),
    **_names(batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"
             " cudnn_batch_norm batch_norm_with_update"),
    "native_group_norm": group_norm,
    **_names(layer_norm, "native_layer_norm _fused_rms_norm"),
    **_names(reduction, "mean sum amax amin var std logsumexp prod linalg_vector_norm any all norm max min var_mean"
             " std_mean argmax argmin median nanmedian mode kthvalue count_nonzero nansum"),
    **_names(along, "_softmax _log_softmax cumsum cumprod cummax cummin sort topk argsort"),
    **_names(attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"
             " _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math"),
    **_names(same, "zeros_like ones_like empty_like full_like rand_like randn_like native_dropout bernoulli bernoulli_"
             " fill_ zero_ uniform_ normal_"),
    "mkldnn_rnn_layer": recurrent,
    "glu": gate,
    "im2col": unfold,
    "col2im": fold,
    "embedding": embedding,
    **_names(fourier, "_fft_r2c _fft_c2r _fft_c2c"),
    **_names(complex_view, "view_as_real view_as_complex"),
    "_weight_norm_interface": weight_norm,
    **_names(dot, "dot vdot"),
    "as_strided_": restride,
    **_names(copy, "copy_ copy"),
    **_names(spatial, "max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d avg_pool2d avg_pool3d"
             " _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d reflection_pad1d"
             " reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
             " mkldnn_max_pool2d fractional_max_pool2d grid_sampler_2d grid_sampler_3d"),
    **_names(unpool, "max_unpool2d max_unpool3d"),
}  # fmt: skip


def rule_for(call: Call) -> Rule | None:
    """The rule of an aten call: by name, else by torch's pointwise tag; None where there is none."""
    rule = _RULES.get(call.name)
    if rule is not None:
        return rule
    if call.name.startswith(("upsample_", "_upsample_")):
        return spatial
    if torch.Tag.pointwise in call.func.tags or call.name in (
        "_prelu_kernel",
        "hardswish",
        "where",
        "addcmul",
    ):
        return elementwise
    return None
