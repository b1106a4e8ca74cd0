"""Networks of the papers on dynamic convolution, by name: where it is, with which options, at which widths.

A preset is data. It is applied to the network that the user has: its layers are told apart by their roles, and its
widths are cuts, so that trained weights are a start. What that leaves of a paper's network is in docs/presets.md.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dyncompress.cost import Choice, widths
from dyncompress.errors import PlanError, shown
from dyncompress.graph import ConvGraph, Operation
from dyncompress.layers import ConvSite, ConvSpec, Method, Static, configured
from dyncompress.roles import Inverted, inverted, roles, writes
from dyncompress.sharing import share_of
from dyncompress.warehouses import warehouses, warehouses_apart, warehouses_behind

__all__ = ["Preset", "Published", "find_preset", "list_presets"]


@dataclass(frozen=True)
class Published:
    """What a paper says that its network costs, at 224x224.

    Attributes:
        network: The network, with its width.
        params: Parameters in millions; None where the paper gives none.
        macs: Multiply-adds in millions; None where the paper gives none.
    """

    network: str
    params: float | None
    macs: float | None


@dataclass(frozen=True)
class Preset:
    """A network of a paper.

    Attributes:
        name: What users call it.
        summary: One line for people.
        form: What the network must look like, one of `FORMS`.
        method: Registered name.
        options: Of the method; a user's override them.
        dynamic: Roles of the layers that become dynamic.
        vary: Options of one layer by its shape, and by that of the depthwise convolution beside it (its own, where
            there is none), where they differ from layer to layer.
        keep: Channels of width groups that are narrowed; the others keep theirs.
        shares: Names of what layers share by their modules, instead of what their method shares by default; other
            layers stay static.
        published: What the paper says that it costs.
    """

    name: str
    summary: str
    form: str
    method: str
    options: Mapping[str, Any]
    dynamic: frozenset[str]
    vary: Callable[[ConvSpec, ConvSpec], Mapping[str, Any]] | None = None
    keep: Callable[[ConvGraph], Mapping[int, int]] | None = None
    shares: Callable[[ConvGraph], Mapping[str, str]] | None = None
    published: tuple[Published, ...] = field(default=(), compare=False)

    def configured(self, method: object, options: Mapping[str, Any] | None) -> Method:
        """The method with the preset's options and the user's.

        Raises:
            PlanError: If a method is given, too.
            DynCompressError: If the method has no such options.
        """
        if method is not None:
            raise PlanError(
                f"method {shown(method)} is given beside preset {self.name!r}, which has its own ({self.method!r});"
                " leave it out, or give options= to change those of the preset"
            )
        configured(self.method, options)  # what is wrong with these alone is said of these alone
        return configured(self.method, {**self.options, **(options or {})})

    def choices(
        self, graph: ConvGraph, method: Method, fixed: Mapping[str, str], options: Mapping[str, Any]
    ) -> list[Choice]:
        """What becomes of every layer.

        Args:
            graph: Channel graph of the network.
            method: What `configured` gave.
            fixed: Layers that stay static whatever the preset says, and why.
            options: The user's options, which go before those that vary by layer.

        Raises:
            PlanError: If the network has not the preset's form; says what was looked for.
        """
        role = roles(graph)
        looked_for, has = FORMS[self.form]
        if not has(graph, role):
            found = ", ".join(f"{list(role.values()).count(r)} {r}" for r in dict.fromkeys(role.values()))
            raise PlanError(
                f"preset {self.name!r} looked for {looked_for}, and the network is none (its layers by role: {found});"
                f" choose a preset for it with dyncompress.presets.list_presets(), or method={self.method!r}"
            )
        chains = {op.module: chain for chain in inverted(graph) for op in chain.members}
        shared = self.shares(graph) if self.shares is not None else None
        made = []
        for op in graph.convs:
            assert op.spec is not None
            left = role[op.module] not in self.dynamic or (shared is not None and op.module not in shared)
            if op.module in fixed or left:
                reason = fixed.get(op.module, f"static: {role[op.module]}, which {self.name} leaves as it is")
                made.append(Choice(op.module, Static(), reason=reason))
                continue
            varied, chain = method, chains.get(op.module)
            if self.vary is not None:
                beside = chain.depthwise.spec if chain is not None else None
                varied = configured(
                    self.method, {**_options(method), **self.vary(op.spec, beside or op.spec), **options}
                )
            placed, reason = varied.place(ConvSite(op.module, op.spec, op.positions))
            share = _share(op, placed, chain) if shared is None or isinstance(placed, Static) else shared[op.module]
            made.append(Choice(op.module, placed, share, reason))
        return made

    def widths(self, graph: ConvGraph, floors: Sequence[int]) -> list[int]:
        """The paper's channels of every width group, or what it must keep, where that is more."""
        full = widths(graph)
        kept = self.keep(graph) if self.keep is not None else {}
        return [max(floor, min(c, kept.get(g, c))) for g, (c, floor) in enumerate(zip(full, floors, strict=True))]


def _options(method: Method) -> dict[str, Any]:
    return {k: v for k, v in vars(method).items() if not k.startswith("_")}


def _share(op: Operation, method: Method, chain: Inverted | None) -> str:
    """Layers of an inverted bottleneck are a block, also where no shortcut goes around it."""
    share = share_of(op, method)
    if share or chain is None or isinstance(method, Static) or method.sharing != "block":
        return share
    return chain.members[0].module if all(each.runs == ((each.positions, 1),) for each in chain.members) else ""


# ---- what a network looks like -----------------------------------------------------------------------------------

Roles = Mapping[str, str]


def _has_blocks(graph: ConvGraph, role: Roles, sizes: set[bool]) -> bool:
    """Whether it has residual blocks, of convolutions that are larger than 1x1 (True in sizes), or are not (False)."""
    inside = [op.spec for op in graph.convs if role[op.module] == "block" and op.spec is not None]
    found = {max(spec.kernel_size) > 1 for spec in inside}
    return found == sizes and not any(spec.is_depthwise for spec in inside) and "depthwise" not in role.values()


def _expands(graph: ConvGraph) -> set[bool]:
    """Whether inverted bottlenecks are wider inside than behind; what is found."""
    return {
        chain.depthwise.spec.out_channels > chain.project.spec.out_channels
        for chain in inverted(graph)
        if chain.expand is not None and chain.depthwise.spec is not None and chain.project.spec is not None
    }


FORMS: dict[str, tuple[str, Callable[[ConvGraph, Roles], bool]]] = {
    "basic": (
        "a ResNet of basic blocks (residual blocks of 3x3 convolutions only, such as ResNet-18)",
        lambda graph, role: _has_blocks(graph, role, {True}),
    ),
    "bottleneck": (
        "a ResNet of bottlenecks (residual blocks of 1x1 and 3x3 convolutions, such as ResNet-50)",
        lambda graph, role: _has_blocks(graph, role, {True, False}),
    ),
    "mobile": (
        "a MobileNetV2 (inverted bottlenecks: 1x1, depthwise and 1x1 convolutions, wider inside than behind)",
        lambda graph, role: True in _expands(graph) and "gate" not in role.values(),
    ),
    "gated": (
        "a MobileNetV3 (inverted bottlenecks, some with squeeze and excitation)",
        lambda graph, role: True in _expands(graph) and "gate" in role.values(),
    ),
    "linear": (
        "a ConvNeXt (depthwise convolutions and linear layers)",
        lambda graph, role: {"block", "linear"} <= set(role.values()) and not inverted(graph),
    ),
    "shuffle": (
        "a ShuffleNetV2 (branches of 1x1, depthwise and 1x1 convolutions, as wide inside as behind)",
        lambda graph, role: _expands(graph) == {False} and "gate" not in role.values(),
    ),
}


# ---- widths ------------------------------------------------------------------------------------------------------


def _halved(graph: ConvGraph) -> dict[int, int]:
    """Half of every width that a residual block writes, inside and behind it."""
    full, role = widths(graph), roles(graph)
    inside = [op for op in graph.convs if role[op.module] in ("block", "shortcut")]
    return {g: -(-full[g] // 2) for op in inside for g in writes(graph, op)}


def _unexpanded(graph: ConvGraph) -> dict[int, int]:
    """Inside an inverted bottleneck as many channels as behind it, or the next multiple of 6."""
    return _inside(graph, lambda _, behind: -(-behind // 6) * 6)


def _quarter(graph: ConvGraph) -> dict[int, int]:
    """Inside a branch that reads half the channels a quarter of its own, as a multiple of 4."""
    return _inside(graph, lambda inside, _: max(4, inside // 16 * 4), strided=False)


def _inside(graph: ConvGraph, width: Callable[[int, int], int], strided: bool = True) -> dict[int, int]:
    """Width groups inside of inverted bottlenecks, by their channels inside and behind."""
    found: dict[int, int] = {}
    for chain in inverted(graph):
        inside, behind = chain.depthwise.spec, chain.project.spec
        if chain.expand is None or inside is None or behind is None:
            continue
        if strided or max(inside.stride) == 1:
            kept = width(inside.out_channels, behind.out_channels)
            found.update(dict.fromkeys(writes(graph, chain.depthwise), kept))
    return found


# ---- options that differ from layer to layer ---------------------------------------------------------------------


def _split(_: ConvSpec, depthwise: ConvSpec) -> dict[str, Any]:
    """Dy-shuffle: only branches that the split feeds are narrowed, and have a depthwise convolution made up for it."""
    return {} if max(depthwise.stride) == 1 else {"group_width": 1}


def _dcd_inverted(spec: ConvSpec, _: ConvSpec) -> dict[str, Any]:
    """L of DCD's MobileNetV2, by the authors' code: a share of the narrower side, of which L^2 is not too much."""
    into, out = spec.in_channels, spec.out_channels
    pool, share = (2, 8) if into < out else (1, 2)
    seen = into * pool**2
    while (latent := min(seen // share, out // share)) ** 2 > 2 * seen:
        share *= 2
    return {"latent": max(4, latent), "pool": pool}


def _dcd_basic(spec: ConvSpec, _: ConvSpec) -> dict[str, Any]:
    """L of DCD's ResNet-18: the square root of the numbers that the router reads, four of a channel."""
    return {"latent": math.isqrt(4 * spec.in_channels), "pool": 2}


def _halved_warehouses(spec: ConvSpec, _: ConvSpec) -> dict[str, Any]:
    """KernelWarehouse's MobileNetV2 at 1/2: the last stage and the classifier have half as many cells, no other."""
    if spec.is_depthwise or max(spec.kernel_size) > 1:
        return {"ratio": 1}
    return {"cell": 1, "cell_in": 0.025} if spec.ndim == 1 else {}


# ---- the presets -------------------------------------------------------------------------------------------------

_RESIDUAL = frozenset({"block", "shortcut"})
_CHAIN = frozenset({"expand", "depthwise", "project"})
_EVERYWHERE = _RESIDUAL | _CHAIN | {"separable", "last", "other"}
_ALL = {"placement": "all"}


def _published(*rows: tuple[str, float | None, float | None]) -> tuple[Published, ...]:
    return tuple(Published(*row) for row in rows)


def _dynet(
    name: str, summary: str, form: str, dynamic: frozenset[str], network: str, macs: float, **how: Any
) -> Preset:
    options = {"g": 6, **how.pop("options"), **_ALL}
    rows = _published((network, None, macs))
    return Preset(name, f"DyNet: {summary}", form, "dynet", options, dynamic, published=rows, **how)


def _odconv(kernels: int, network: str, form: str, *rows: tuple[str, float | None, float | None]) -> Preset:
    return Preset(
        f"odconv-{network.lower().replace('-', '')}-{kernels}x", f"ODConv ({kernels}x) in {network}", form, "odconv",
        {"kernels": kernels, "linear": form == "linear", **_ALL}, _EVERYWHERE - {"shortcut"} | {"linear"},
        published=_published(*rows),
    )  # fmt: skip


def _dyconv(network: str, form: str, *rows: tuple[str, float | None, float | None]) -> Preset:
    return Preset(
        f"dycnn-{network.lower().replace('-', '')}", f"DY-CNN in {network}", form, "dyconv", {"kernels": 4, **_ALL},
        _EVERYWHERE, published=_published(*rows),
    )  # fmt: skip


def _warehouse(ratio: float, network: str, form: str, *rows: tuple[str, float, None], **how: Any) -> Preset:
    """KernelWarehouse with the warehouses of its authors' networks."""
    options = {"ratio": ratio, **how.pop("options", {}), **_ALL}
    return Preset(
        f"kernelwarehouse-{network.lower().replace('-', '')}-{ratio:g}x", f"KernelWarehouse ({ratio:g}x) in {network}",
        form, "kernelwarehouse", options, how.pop("dynamic", _EVERYWHERE | {"stem", "linear"}),
        published=_published(*rows), **{"shares": warehouses, **how},
    )  # fmt: skip


_PRESETS = (
    _dynet("dy-resnet18", "Dy-ResNet18, half the channels", "basic", _RESIDUAL, "ResNet-18", 550,
           keep=_halved, options={"reduction": 4}),
    _dynet("dy-resnet50", "Dy-ResNet50, half the channels", "bottleneck", _RESIDUAL, "ResNet-50", 1075,
           keep=_halved, options={"reduction": 4}),
    _dynet("dy-mobile", "Dy-mobile, MobileNetV2 without expansion", "mobile", _CHAIN | {"separable"},
           "MobileNetV2", 129,
           keep=_unexpanded, options={"reduction": 0, "group_width": 6}),
    _dynet("dy-shuffle", "Dy-shuffle, ShuffleNetV2 with narrow branches", "shuffle", _CHAIN, "ShuffleNetV2", 88,
           keep=_quarter, vary=_split, options={"reduction": 0, "group_width": 4}),
    _odconv(1, "ResNet18", "basic", ("ResNet-18", 11.94, 1838)),
    _odconv(4, "ResNet18", "basic", ("ResNet-18", 44.90, 1916)),
    _odconv(1, "ResNet50", "bottleneck", ("ResNet-50", 28.64, 3916)),
    _odconv(4, "ResNet50", "bottleneck", ("ResNet-50", 90.67, 4080)),
    _odconv(1, "ResNet101", "bottleneck", ("ResNet-101", 50.82, 7675)),
    _odconv(2, "ResNet101", "bottleneck", ("ResNet-101", 90.44, 7802)),
    _odconv(1, "MobileNetV2", "mobile", ("MobileNetV2", 4.94, 311.8), ("MobileNetV2 0.75", 3.51, 217.1),
            ("MobileNetV2 0.5", 2.43, 101.8)),
    _odconv(4, "MobileNetV2", "mobile", ("MobileNetV2", 11.51, 327.1), ("MobileNetV2 0.75", 7.50, 226.3),
            ("MobileNetV2 0.5", 4.44, 106.4)),
    _odconv(1, "ConvNeXt-T", "linear"),
    _odconv(4, "ConvNeXt-T", "linear"),
    _dyconv("ResNet10", "basic"),
    _dyconv("ResNet18", "basic", ("ResNet-18", 42.7, 1850)),
    _dyconv("MobileNetV2", "mobile", ("MobileNetV2", 11.1, 312.9), ("MobileNetV2 0.75", None, 217.5),
            ("MobileNetV2 0.5", 4.0, 101.4)),
    _dyconv("MobileNetV3", "gated", ("MobileNetV3-Small", None, 68.5)),
    Preset("dcd-resnet18", "DCD in ResNet18", "basic", "dcd", _ALL, frozenset({"block"}), _dcd_basic,
           published=_published(("ResNet-18", 14.70, None))),
    Preset("dcd-resnet50", "DCD in ResNet50", "bottleneck", "dcd", _ALL, frozenset({"block"})),
    Preset("dcd-mobilenetv2", "DCD in MobileNetV2", "mobile", "dcd", _ALL, frozenset({"expand", "project"}),
           _dcd_inverted),
    Preset("dcd-convnextt", "DCD in ConvNeXt-T", "linear", "dcd", {"linear": True, **_ALL}, frozenset({"linear"})),
    _warehouse(0.25, "ResNet18", "basic", ("ResNet-18", 4.08, None)),
    _warehouse(0.5, "ResNet18", "basic", ("ResNet-18", 7.43, None)),
    _warehouse(1, "ResNet18", "basic", ("ResNet-18", 11.93, None)),
    _warehouse(2, "ResNet18", "basic", ("ResNet-18", 23.24, None)),
    _warehouse(4, "ResNet18", "basic", ("ResNet-18", 45.86, None)),
    _warehouse(0.5, "ResNet50", "bottleneck", ("ResNet-50", 17.64, None), options={"basis": 1 / 16}),
    _warehouse(1, "ResNet50", "bottleneck", ("ResNet-50", 28.05, None)),
    _warehouse(4, "ResNet50", "bottleneck", ("ResNet-50", 102.02, None)),
    _warehouse(0.5, "MobileNetV2", "mobile", ("MobileNetV2", 2.65, None), ("MobileNetV2 0.5", 1.47, None),
               options={"reduction": 1 / 32}, vary=_halved_warehouses, shares=warehouses_behind,
               dynamic=_EVERYWHERE | {"stem", "classifier"}),
    _warehouse(1, "MobileNetV2", "mobile", ("MobileNetV2", 5.17, None), ("MobileNetV2 0.5", 2.85, None)),
    _warehouse(4, "MobileNetV2", "mobile", ("MobileNetV2", 11.38, None), ("MobileNetV2 0.5", 4.65, None),
               shares=warehouses_apart),
    _warehouse(1, "ConvNeXt-T", "linear", ("ConvNeXt-T", 39.37, None)),
)  # fmt: skip


def list_presets() -> list[Preset]:
    """All presets, by name."""
    return sorted(_PRESETS, key=lambda preset: preset.name)


def find_preset(name: object) -> Preset:
    """A preset by its name.

    Raises:
        PlanError: If there is none of that name; names the nearest, and all.
    """
    known = {preset.name: preset for preset in _PRESETS}
    if isinstance(name, str) and name in known:
        return known[name]
    near = difflib.get_close_matches(str(name)[:100].lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise PlanError(f"no preset {shown(name)}; choose one of {', '.join(sorted(known))}{hint}")
