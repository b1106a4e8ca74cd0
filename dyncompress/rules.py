"""What each aten op does to channel labels. `rule_for` finds the rule of a call by its name and tags."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dyncompress.labels import Maps, core, varies
from dyncompress.movement import cut_out, join, move, pad, pick, split, view
from dyncompress.products import attention, convolution, dot, embedding, fold, matmul, recurrent, unfold, weight_norm
from dyncompress.propagation import Call
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
    why = mode.at(f"{call.name} with values that differ by channel and aren't labelled")
    results: list[Tensor] = []
    for m, owner in zip(merged, owners, strict=True):
        others = [t for i, t in enumerate(call.tensors) if i not in owner]
        apart = {d for t in others for d in _differs(t, varies(m), len(shape))}
        results += _alike_along(call, m, sorted(apart), why)
    return tuple(results)


def _alike_along(call: Call, m: Tensor, dims: list[int], reason: str) -> Maps:
    """A map that no longer changes along some dimensions: what is cut there is cut at every position.

    Where it changes along no other dimension, all its channels would share one fate: they are pinned, and no map is
    left.
    """
    if dims and set(varies(m)) <= set(dims):
        call.mode.ledger.pin(core(m), reason)
        return ()
    for d in dims:
        if d in varies(m):
            first = m.narrow(d, 0, 1).expand(m.shape)
            call.mode.ledger.tie_maps(m, first, reason)
            m = first
    return (m,)


def _differs(tensor: Tensor, dims: list[int], rank: int) -> list[int]:
    """Dimensions of the result along which the values of an operand differ."""
    found = []
    for d in dims:
        own = d - (rank - tensor.dim())
        if own >= 0 and tensor.shape[own] > 1 and bool((tensor != tensor.narrow(own, 0, 1)).any()):
            found.append(d)
    return found


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
        (m,) = _alike_along(call, m, dims, call.name)
        for d in sorted(dims, reverse=True):
            m = m.narrow(d, 0, 1) if call.arg("keepdim", False) else m.select(d, 0)
        results.append(m)
    return _each(call, results)


def along(call: Call) -> tuple[Maps, ...]:
    """softmax, cumsum, sort: every one along the dimension depends on every other."""
    dim = call.arg("dim", -1) % call.tensors[0].dim()
    shape, results = call.first_out.shape, []
    across = call.mode.at(f"{call.name} across channels")
    for m in call.mode.maps(call.tensors[0]):
        for left in _alike_along(call, m, [dim], across) if dim in varies(m) else (m,):
            results.append(left if left.shape == shape else left.narrow(dim, 0, 1).expand(shape))  # topk keeps fewer
    return _each(call, results)


def gate(call: Call) -> Maps:
    """``glu``: one half opens the other."""
    dim, results = call.arg("dim", -1) % call.tensors[0].dim(), []
    for m in call.mode.maps(call.tensors[0]):
        a, b = m.chunk(2, dim)
        if dim in varies(m):
            call.mode.ledger.tie_maps(a, b, call.name)
        results.append(a)
    return tuple(results)


def windows(call: Call) -> Maps:
    """``x.unfold``: overlapping windows of a dimension, as a last one."""
    source, out, results = call.tensors[0], call.first_out, []
    dim = call.arg("dimension") % source.dim()
    for m in call.mode.maps(source):
        if dim in varies(m):
            call.mode.ledger.pin(core(m), call.mode.at("windows of a labelled dimension"))
            continue
        results.append(m.narrow(dim, 0, 1).unsqueeze(-1).expand(out.shape))
    return tuple(results)


def put(call: Call) -> Maps:
    """``x[mask] = value``: what is written has the channels of what it is written over."""
    target, value = call.arg("self"), call.arg("values")
    picked = sum(index.dim() if index.dtype == torch.bool else 1 for index in call.arg("indices") if index is not None)
    for m in call.mode.maps(target):
        if min(varies(m)) < picked:
            call.mode.ledger.pin(core(m), call.mode.at(f"channels picked by number ({call.name})"))
    for back in range(1, min(value.dim(), target.dim() - picked) + 1):
        if value.shape[-back] == target.shape[-back]:
            a, b = call.mode.ids(value, value.dim() - back), call.mode.ids(target, target.dim() - back)
            call.mode.ledger.tie(a, b, call.mode.at("written over channels that can't be cut"))
    return call.mode.maps(target)


def unpool(call: Call) -> Maps:
    """Back to where the maxima were: the channels of values and places go together."""
    values, places = call.tensors
    for m, n in zip(call.mode.maps(values), call.mode.maps(places), strict=False):
        call.mode.ledger.tie_maps(m, n, call.mode.at("meets channels that can't be cut"))
    return spatial(call)  # type: ignore[return-value]


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
    **_names(move, "permute transpose t transpose_ t_ expand clone detach alias contiguous squeeze"
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
    **_names(same, "_to_copy zeros_like ones_like empty_like full_like rand_like randn_like native_dropout bernoulli"
             " bernoulli_ fill_ zero_ uniform_ normal_"),
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
    "unfold": windows,
    **_names(put, "index_put index_put_ _index_put_impl_"),
    **_names(unpool, "max_unpool2d max_unpool3d"),
}  # fmt: skip


# pointwise, though torch doesn't say so; those of the first line it does name since some release after 2.4
_POINTWISE = frozenset(
    "celu elu hardshrink hardsigmoid isfinite ldexp leaky_relu mish rad2deg relu6 selu softplus softshrink threshold"
    " _prelu_kernel hardswish hardtanh where addcmul rrelu_with_noise log_sigmoid_forward bernoulli real imag _conj"
    " polar complex fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask"
    " _fake_quantize_learnable_per_tensor_affine _fake_quantize_per_tensor_affine_cachemask_tensor_qparams".split()
)


def rule_for(call: Call) -> Rule | None:
    """The rule of an aten call: by name, in place or not, else by torch's pointwise tag; None where there is none."""
    name = call.name.rstrip("_")
    rule = _RULES.get(call.name) or _RULES.get(name)
    if rule is not None:
        return rule
    if name.startswith(("upsample_", "_upsample_")):
        return spatial
    if torch.Tag.pointwise in call.func.tags or name in _POINTWISE:
        return elementwise
    return None
