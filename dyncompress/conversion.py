"""Carry a plan out: cut the network, put the methods' layers in, and let it start where the narrowed one stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyncompress.compensation import Fit, WarmStart, compensate, evaluating
from dyncompress.cost import fits
from dyncompress.errors import CheckpointError, DynCompressError, PlanError
from dyncompress.graph import as_call, bare, duplicate, misfit, parameter_shapes
from dyncompress.importance import best, importance
from dyncompress.layers import Static, TokenConv, load_static
from dyncompress.narrowing import cut, positions
from dyncompress.plan import Plan
from dyncompress.reconstruction import reconstruct

TAG = "_dyncompress"
_KEY = f"{TAG}._extra_state"


class PlanTag(nn.Module):
    """Carries the plan in the network's state dict, as extra state: a uint8 tensor of its JSON.

    Extra state, and not a buffer: averaging callbacks average buffers, and would corrupt it. A tensor, and not a
    dict: safetensors and ``torch.load(weights_only=True)`` take nothing else. It sits in the plan's first
    convolution, where no code iterates over children.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def get_extra_state(self) -> Tensor:
        """The plan as a uint8 tensor of JSON."""
        return torch.frombuffer(bytearray(self.plan.to_json().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights that were written under another plan."""
        if type(state).__name__ == "_EXTRA_STATE":
            return  # FSDP2 loads a full checkpoint tensor by tensor; this is torch's word for "not this one"
        found, own = bytes(state.cpu().numpy().tobytes()), self.plan.to_json()
        if found != own.encode() and not _same(found, own):
            raise CheckpointError(
                "the state dict was written by a network of another plan; rebuild it first, with dyncompress.load,"
                " dyncompress.load_from_checkpoint or convert(net, the checkpoint's plan)"
            )


def _same(text: bytes, own: str) -> bool:
    """Whether two texts are one plan: one of an earlier version is written differently."""
    try:
        return Plan.from_json(text.decode()) == Plan.from_json(own)
    except (PlanError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the plan in the state dict is damaged: {error}") from None


def convert(
    net: nn.Module,
    plan: Plan,
    *,
    seed: int = 0,
    calibrate: Iterable[Any] | None = None,
    warm_start: str | WarmStart = "ridge",
) -> nn.Module:
    """A student: the network with the plan carried out. The network itself stays as it is.

    The student computes exactly what the narrowed static network computes, until it is trained, unless ``warm_start``
    asks for fitted dynamics.

    Args:
        net: The network that the plan was made for.
        plan: The decision.
        seed: Of routers, of the noise that tells the kernels of a bank apart, and of what is sampled of the batches.
        calibrate: A few inputs, each as `trace` takes them, on the network's device: what the cut left is fitted to
            the original on them (``warm_start``), and BatchNorm statistics are estimated anew. Without them weights
            and statistics are those of the kept channels.
        warm_start: ``"ridge"`` or ``"plain"``, or a `WarmStart`.

    Returns:
        A new network.

    Raises:
        PlanError: If the plan doesn't fit the network; names the first difference.
        DynCompressError: If there is no such warm start, or a number on the way isn't finite.
    """
    return convert_(duplicate(bare(net)), plan, seed=seed, calibrate=calibrate, warm_start=warm_start)


def convert_(
    net: nn.Module,
    plan: Plan,
    *,
    seed: int = 0,
    calibrate: Iterable[Any] | None = None,
    warm_start: str | WarmStart = "ridge",
) -> nn.Module:
    """`convert` in place; nothing is touched when the plan doesn't fit.

    Parameters that a method doesn't replace keep their identity.
    """
    found = [] if calibrate is None else _listed(calibrate)
    start = WarmStart.of(warm_start).within(len(found))
    plan = resolve(net, plan)
    twin = None if calibrate is None else duplicate(net)
    with torch.random.fork_rng(devices=[]):  # layers are initialised before they are loaded; some routers stay so
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the devices, which are not forked
        layers = _layers(plan)
    fitted = start.dynamics == "fitted" and bool(layers)
    originals = {op.module: _filters(net.get_submodule(op.module))[0].detach() for op in plan.graph.convs}
    _cut(net, plan)
    if calibrate is not None and twin is not None:
        fit(net, twin, plan, found, start, seed, settle=not fitted)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        old: Any = net.get_submodule(name)
        weight, bias = _filters(old)
        layer.to(weight.device, weight.dtype)
        spare = _spare(originals[name], plan, f"{name}.weight") if start.bank == "filters" else None
        load_static(layer, weight, bias, spare=spare, generator=generator)
        layer.train(old.training)
        if not old.weight.requires_grad:
            layer.requires_grad_(False)
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, TokenConv(layer) if isinstance(old, nn.Linear) else layer)
    if fitted and twin is not None:
        reconstruct(net, twin, plan, found, strength=start.strength, rows=start.rows, seed=seed)
        settle_norms(net, found)
    anchor = net.get_submodule(plan.graph.anchor)
    anchor.add_module(TAG, PlanTag(plan))
    return net


def narrowed(net: nn.Module, plan: Plan) -> nn.Module:
    """The static network of the plan's widths: what the student computes at step 0, without calibration."""
    copy = duplicate(bare(net))
    _cut(copy, resolve(copy, plan))
    return copy


def fit(
    net: nn.Module,
    original: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    start: WarmStart,
    seed: int = 0,
    *,
    settle: bool = True,
) -> tuple[Fit, ...]:
    """Bring a narrowed, still static network near the original on a few batches, in place.

    Args:
        net: From `narrowed`.
        original: What it was cut from.
        plan: The plan, as `resolve` gives it.
        batches: Inputs, each as `trace` takes them.
        start: How.
        seed: Of which places are sampled.
        settle: False where `reconstruct` follows: BatchNorm statistics stay, and every fifth image is held out.

    Returns:
        What became of each layer; nothing for ``"plain"``, which estimates only BatchNorm statistics.
    """
    found = _listed(batches)
    if start.fit == "plain":
        recalibrate(net, found)
        return ()
    how: dict[str, Any] = {"strength": start.strength, "rows": start.rows, "seed": seed}
    fits = compensate(net, original, plan, found, **how, hold_out=not settle)
    if settle:
        settle_norms(net, found)
    return fits


def _listed(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, Tensor):
        raise DynCompressError(f"calibrate is one tensor {tuple(batches.shape)}; give a list of batches, [images]")
    return list(batches)


def resolve(net: nn.Module, plan: Plan) -> Plan:
    """The same plan with the kept channels named: the best by magnitude, where it gives only their number.

    Raises:
        PlanError: If the plan doesn't fit the network, or the network is converted already.
    """
    if plan_of(net) is not None:
        raise PlanError(f"{type(net).__name__} is converted already; convert the original network")
    difference = fits(plan.graph, parameter_shapes(net)) or misfit(net, plan.graph)
    if difference:
        raise PlanError(
            f"the plan was made for another network: {difference}; make one for this network with make_plan"
        )
    if all(not isinstance(k, int) for k in plan.keep):
        return plan
    scores = importance(net, plan.graph)
    keep = tuple(best(s, k) if isinstance(k, int) else k for s, k in zip(scores, plan.keep, strict=True))
    return dataclasses.replace(plan, keep=keep)


def _cut(net: nn.Module, plan: Plan) -> None:
    cut(net, plan.graph, [k for k in plan.keep if not isinstance(k, int)])


def _filters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Kernel and bias of a convolution; those of a linear layer as a pointwise one."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    return weight.unsqueeze(-1) if isinstance(layer, nn.Linear) else weight, bias


def _spare(weight: Tensor, plan: Plan, name: str) -> Tensor | None:
    """Filters that the cut discarded, with the input channels that it kept."""
    kept = [k for k in plan.keep if not isinstance(k, int)]
    axes = plan.graph.axes
    if f"{name}:0" not in axes:
        return None
    stay = set(positions(axes[f"{name}:0"], kept))
    gone = [i for i in range(weight.shape[0]) if i not in stay]
    spare = weight[gone]
    if f"{name}:1" in axes:
        spare = spare[:, positions(axes[f"{name}:1"], kept)]
    return spare


def _layers(plan: Plan) -> dict[str, nn.Module]:
    """A fresh layer for every convolution that doesn't stay static, built together with those it shares with."""
    model = plan.costs
    layers: dict[str, nn.Module] = {}
    for members in model.sets:
        method = model.choices[members[0].module].method
        if not isinstance(method, Static):
            built = method.build([model.site(op, plan.widths) for op in members])
            layers |= zip((op.module for op in members), built, strict=True)
    return layers


def plan_of(net: nn.Module) -> Plan | None:
    """The plan that a converted network carries; None for any other."""
    return next((m.plan for m in net.modules() if isinstance(m, PlanTag)), None)


def plans_in(state: Mapping[str, Any]) -> dict[str, Plan]:
    """Plans in a state dict, by the prefix of the network that each belongs to ('' or 'net.', say).

    Raises:
        CheckpointError: If a plan is there but unreadable.
    """
    plans = {}
    for key, value in state.items():
        if not f".{key}".endswith(f".{_KEY}") or not isinstance(value, Tensor):
            continue
        if value.dtype != torch.uint8:
            raise CheckpointError(f"the plan in '{key}' is damaged: it is text as uint8, and here {value.dtype}")
        try:
            plan = Plan.from_json(bytes(value.cpu().numpy().tobytes()).decode())
        except (PlanError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the plan in '{key}' is damaged: {error}") from None
        anchor = f"{plan.graph.anchor}.{_KEY}".removeprefix(".")
        if not key.endswith(anchor):
            raise CheckpointError(f"the plan in '{key}' belongs to '{anchor}'; the checkpoint is damaged")
        plans[key.removesuffix(anchor)] = plan
    return plans


def recalibrate(net: nn.Module, batches: Iterable[Any]) -> int:
    """Estimate BatchNorm statistics anew on a few batches: a cut network's differ from the original's.

    Args:
        net: The network; its modes are left as found.
        batches: Inputs, each as `trace` takes them.

    Returns:
        Number of batches that were used.

    Raises:
        DynCompressError: If the statistics come out as NaN or infinite; the old ones are put back.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = {m: name for name, m in net.named_modules() if isinstance(m, kind) and m.track_running_stats}
    found = list(batches)
    if not norms or not found:
        return 0
    momenta = {m: m.momentum for m in norms}
    before = {m: {name: value.clone() for name, value in m.named_buffers()} for m in norms}
    try:
        with evaluating(net), torch.no_grad():
            for m in norms:
                m.reset_running_stats()
                m.momentum = None  # a cumulative average
                m.train()
            for batch in found:
                args, kwargs = as_call(batch)
                net(*args, **kwargs)
            _check_statistics(norms, len(found))
    except BaseException:
        with torch.no_grad():
            for m, old in before.items():
                for name, value in old.items():
                    m.get_buffer(name).copy_(value)
        raise
    finally:
        for m, momentum in momenta.items():
            m.momentum = momentum
    return len(found)


def settle_norms(net: nn.Module, batches: Iterable[Any]) -> None:
    """Estimate BatchNorm statistics anew without changing what the network computes.

    Scale and shift take up the difference, with s = sqrt(var + eps)::

        shift += scale * (mean_new - mean_old) / s_old,      scale *= s_new / s_old

    So in training mode, where batches normalise, it starts from what it computes in eval mode. A norm without scale and
    shift, or without statistics, stays as it is.

    Args:
        net: The network.
        batches: Inputs, each as `trace` takes them.

    Raises:
        DynCompressError: If the statistics come out as NaN or infinite; nothing is changed then.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = {m: name for name, m in net.named_modules() if isinstance(m, kind) and m.affine and m.track_running_stats}
    found = list(batches)
    seen: dict[Any, list[tuple[Tensor, Tensor]]] = {m: [] for m in norms}

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].transpose(0, 1).flatten(1).to(torch.promote_types(args[0].dtype, torch.float32))
        seen[norm].append(torch.var_mean(values, 1, correction=min(1, values.shape[1] - 1)))

    handles = [m.register_forward_pre_hook(look) for m in norms]
    try:
        # Not in training mode, as `recalibrate` does: behind a norm, its old scale with new statistics would be seen.
        with evaluating(net), torch.no_grad():
            for batch in found:
                args, kwargs = as_call(batch)
                net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    averages = {
        m: [torch.stack(part).mean(0) for part in zip(*found, strict=True)] for m, found in seen.items() if found
    }
    odd = [norms[m] for m, (var, mean) in averages.items() if not (var.isfinite().all() and mean.isfinite().all())]
    if odd:
        raise DynCompressError(_unsettled(odd[0], len(found)))
    with torch.no_grad():
        for m, (var, mean) in averages.items():
            spread = (m.running_var + m.eps).sqrt()
            m.bias += m.weight * (mean.to(spread) - m.running_mean) / spread
            m.weight *= (var.to(spread) + m.eps).sqrt() / spread
            m.running_mean.copy_(mean)
            m.running_var.copy_(var)


def _check_statistics(norms: Mapping[nn.modules.batchnorm._BatchNorm, str], count: int) -> None:
    for m, name in norms.items():
        if not all(value.isfinite().all() for value in m.buffers()):
            raise DynCompressError(_unsettled(name, count))


def _unsettled(name: str, count: int) -> str:
    return (
        f"on these {count} batches the statistics of BatchNorm '{name}' are not finite; the numbers in the data and in"
        " the weights must be: look for NaN and infinity in both"
    )
