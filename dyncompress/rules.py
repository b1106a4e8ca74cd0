"""What each aten op does to channel labels. `rule_for` finds the rule of a call by its name and tags."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dyncompress.labels import Maps, core, varies
from dyncompress.movement import move, pad, pick, split, view
from dyncompress.propagation import Call, Operation

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
            if set(varies(m)) & set(varies(other)):
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
    for m, owner in zip(merged, owners, strict=True):
        for i, t in enumerate(call.tensors):
            if i not in owner and _differs(t, varies(m), len(shape)):
                mode.ledger.pin(core(m), mode.at(f"{call.name} with values that differ by channel and aren't labelled"))
    return tuple(merged)


def _differs(tensor: Tensor, dims: list[int], rank: int) -> bool:
    for d in dims:
        own = d - (rank - tensor.dim())
        if own >= 0 and tensor.shape[own] > 1 and bool((tensor != tensor.narrow(own, 0, 1)).any()):
            return True
    return False


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
    mode.recording.operations.append(Operation(mode.module, kind, mode.name_of(w), fixed, axes, positions))
    mode.convolved[id(out)] = mode.module
    return (leaving.view([1, -1] + [1] * (out.dim() - 2)).expand(out.shape),)


def matmul(call: Call) -> Maps:
    """mm, bmm, addmm, baddbmm, mv: contracted channels are tied, the others pass on."""
    mode, ledger = call.mode, call.mode.ledger
    a, b = call.tensors[-2:]
    out = call.first_out
    reason = mode.at("meets features that can't be cut")
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
    if len(call.tensors) == 3:  # the added term
        for m in mode.maps(call.tensors[0]):
            for p in passed:
                ledger.tie_maps(m.expand(out.shape), p, reason)
            if not passed:
                ledger.pin(core(m), reason)
    axes = (*inner, *[core(m) for m in [*rows, *columns]])
    total = out.numel() * a.shape[-1]
    name = mode.name_of(b) or mode.name_of(a)
    fixed = total // math.prod(len(x) for x in axes)
    mode.recording.operations.append(Operation(mode.module, "matmul", name, fixed, axes))
    return tuple(passed)


def batch_norm(call: Call) -> tuple[Maps, ...]:
    """Scale, shift and statistics belong to the channels."""
    entering = call.mode.ids(call.tensors[0], 1)
    conv = call.mode.convolved.get(id(call.tensors[0]))
    if conv is not None:
        call.mode.recording.norms.setdefault(conv, call.mode.module)
    for t in call.tensors[1:]:
        call.mode.ledger.tie(call.mode.ids(t, 0), entering, call.mode.at("normalises channels that can't be cut"))
    return (call.mode.maps(call.tensors[0]), (), (), (), ())


def group_norm(call: Call) -> tuple[Maps, ...]:
    """Each group keeps as many channels as the others."""
    groups, entering = call.arg("group"), call.mode.ids(call.tensors[0], 1)
    reason = call.mode.at("normalises channels that can't be cut")
    if groups > 1:
        call.mode.ledger.tie(entering.view(groups, -1), entering.view(groups, -1)[:1], reason)
    for t in call.tensors[1:]:
        call.mode.ledger.tie(call.mode.ids(t, 0), entering, reason)
    return (call.mode.maps(call.tensors[0]), (), ())


def layer_norm(call: Call) -> tuple[Maps, ...]:
    """An elementwise op with its weight and bias, as far as labels go."""
    return (elementwise(call), (), ())


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


def reduction(call: Call) -> Maps:
    """Channels that are summed over are gone; the others pass."""
    source, results = call.tensors[0], []
    dims = call.arg("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(source.dim()))
    dims = [d % source.dim() for d in dims]
    for m in call.mode.maps(source):
        if any(d in varies(m) for d in dims):
            continue
        for d in sorted(dims, reverse=True):
            m = m.narrow(d, 0, 1) if call.arg("keepdim", False) else m.select(d, 0)
        results.append(m)
    return tuple(results)


def along(call: Call) -> Maps:
    """softmax, cumsum: fine across positions; across channels every one depends on every other."""
    dim = call.arg("dim") % call.tensors[0].dim()
    for m in call.mode.maps(call.tensors[0]):
        if dim in varies(m):
            call.mode.ledger.pin(core(m), call.mode.at(f"{call.name} across channels"))
    return call.mode.maps(call.tensors[0])


def attention(call: Call) -> Maps:
    """Fused attention: queries and keys keep their width (it sets the scale); values pass."""
    q, k, v = call.tensors[:3]
    call.mode.pin([q, k], call.mode.at("query and key width of attention"))
    out = call.first_out
    macs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    call.mode.recording.operations.append(Operation(call.mode.module, "matmul", "", macs, ()))
    return tuple(m.select(-2, 0).unsqueeze(-2).expand(out.shape) for m in call.mode.maps(v) if 2 not in varies(m))


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
    target, source = call.tensors
    if target._base is not None and not call.mode.maps(target):
        call.mode.pin([source], call.mode.at("channels are written into part of another tensor"))
        return ()
    return elementwise(call)


def _names(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_names(move, "permute transpose t transpose_ t_ expand clone detach alias _to_copy contiguous cat stack squeeze"
             " squeeze_ unsqueeze unsqueeze_ flip repeat pixel_shuffle pixel_unshuffle channel_shuffle lift_fresh"
             " native_channel_shuffle mT T movedim"),
    **_names(view, "view _unsafe_view reshape _reshape_alias view_copy"),
    **_names(split, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
    **_names(pick, "slice select index index_select roll unbind"),
    "constant_pad_nd": pad,
    "convolution": convolution,
    **_names(matmul, "mm bmm addmm baddbmm mv"),
    **_names(batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"
             " cudnn_batch_norm batch_norm_with_update"),
    "native_group_norm": group_norm,
    **_names(layer_norm, "native_layer_norm _fused_rms_norm"),
    **_names(reduction, "mean sum amax amin var std logsumexp prod linalg_vector_norm any all norm"),
    **_names(along, "_softmax _log_softmax cumsum"),
    **_names(attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"
             " _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math"),
    **_names(same, "zeros_like ones_like empty_like full_like rand_like randn_like native_dropout bernoulli bernoulli_"
             " fill_ zero_ uniform_ normal_"),
    "as_strided_": restride,
    **_names(copy, "copy_ copy"),
    **_names(spatial, "max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d avg_pool2d avg_pool3d"
             " _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d reflection_pad1d"
             " reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
             " mkldnn_max_pool2d fractional_max_pool2d grid_sampler_2d"),
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
