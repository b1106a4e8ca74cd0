"""All methods on one convolution: what each costs, what of it depends on the input, how long it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dyncompress.errors import DynCompressError, shown
from dyncompress.latency import Latency, measure_latency
from dyncompress.layers import ConvSite, ConvSpec, DynamicConv, Macs, Method, Static, get_method, list_methods

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["Entry", "compare", "everywhere", "reference", "shipped", "tables"]

_STYLE: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0), "pad_edge": False, "header_style": "dim"}


@dataclass(frozen=True)
class Entry:
    """One method on one convolution that it is built for alone.

    Attributes:
        name: Registered name.
        paper: Where it is from.
        options: Its options, by name.
        adapts: What depends on the input; empty where the method does not say.
        sharing: Which layers are built together in a network: "layer" (none), "block" or "stage".
        exceptions: Clauses of the contract that it does not keep, each with the reason.
        macs: Multiply-adds of one image; None where the method cannot be.
        params: Parameters; None where the method cannot be.
        macs_ratio: MACs / MACs of the static convolution.
        params_ratio: Parameters / parameters of the static convolution.
        refused: Why the method cannot be there; empty where it can.
        placed: What `place` makes of it by default, and why; empty where it is this method unchanged.
        latency: Time of a batch of one image against the static convolution, where it was measured.
    """

    name: str
    paper: str
    options: Mapping[str, Any]
    adapts: str
    sharing: str
    exceptions: Mapping[str, str]
    macs: Macs | None = None
    params: int | None = None
    macs_ratio: float | None = None
    params_ratio: float | None = None
    refused: str = ""
    placed: str = ""
    latency: Latency | None = None


def reference(channels: int = 64, kernel: int = 3, size: int = 28, groups: int = 1, dims: int = 2) -> ConvSite:
    """The convolution that methods are compared on: as many channels out as in, padded by half a kernel, no bias.

    Args:
        channels: In and out.
        kernel: In every dimension.
        size: Of the input, in every dimension.
        groups: Of channels.
        dims: Spatial dimensions, 1 to 3.

    Raises:
        DynCompressError: If there is no such convolution.

    Example:
        >>> site = reference(channels=8, kernel=3, size=14)
        >>> str(site.spec), site.positions
        ('8 -> 8, 3x3, padding 1, no bias', 196)
    """
    if size < 1:
        raise DynCompressError(f"size {shown(size)} is not positive: give the pixels of an input's side, 28 say")
    pads = (kernel // 2,) * dims
    spec = ConvSpec(channels, channels, (kernel,) * dims, padding=pads, groups=groups, bias=False)
    return ConvSite("reference", spec, torch.Size(spec.output_size((size,) * dims)).numel())


def everywhere(method: Method) -> Method:
    """The method without the rule that leaves layers static where a bank does not pay."""
    made: Any = method
    if any(field.name == "placement" for field in dataclasses.fields(made)):
        made = dataclasses.replace(made, placement="all")
    found: Method = made
    return found


def shipped(method: Method, site: ConvSite) -> nn.Module:
    """One layer of a method as `fold` ships it, built alone, with random weights."""
    (layer,) = method.build([site])
    if isinstance(layer, DynamicConv):
        (layer,) = layer.shipped([layer])
    return layer.eval()


def compare(
    site: ConvSite, methods: Sequence[Method] | None = None, *, example: torch.Tensor | None = None
) -> list[Entry]:
    """What each method is on a convolution.

    Args:
        site: The convolution.
        methods: What to compare; all registered ones with their default options if None.
        example: Input [1, in, *size]; with it the layers, as they are shipped, are timed in turns on one thread.

    Returns:
        One entry per method; costs are those with a bank, also where `place` would leave the layer static.

    Example:
        >>> from dyncompress.layers import DyNet
        >>> (entry,) = compare(reference(channels=8, size=14), [DyNet(g=4)])
        >>> entry.macs, entry.params_ratio > 4, entry.placed
        (Macs(conv=112896, kernels=2304, router=256), True, '')
    """
    methods = [get_method(name) for name in list_methods()] if methods is None else methods
    entries, nets = [], {"static": shipped(Static(), site)}
    for index, method in enumerate(methods):
        entry, bank = _entry(method, site)
        entries.append(entry)
        if bank is not None and not isinstance(bank, Static):
            nets[str(index)] = shipped(bank, site)
    if example is None:
        return entries
    times = measure_latency(nets, example, batch_sizes=(1,), rounds=50, threads=1)
    return [
        entry if entry.refused else dataclasses.replace(entry, latency=times.get(str(index), times["static"])[1])
        for index, entry in enumerate(entries)
    ]


def _entry(method: Method, site: ConvSite) -> tuple[Entry, Method | None]:
    """What a method is on a convolution, and the method that is built there; None where it can't be."""
    about: Any = method
    entry = Entry(
        name=method.name,
        paper=method.paper,
        options=dataclasses.asdict(about),
        adapts=getattr(method, "adapts", ""),
        sharing=method.sharing,
        exceptions=dict(getattr(method, "exceptions", {})),
    )
    bank, reason = everywhere(method).place(site)
    if isinstance(bank, Static) and not isinstance(method, Static):
        return dataclasses.replace(entry, refused=reason), None
    (macs,), (params,) = bank.macs([site]), bank.params([site])
    (plain,), (weights,) = Static().macs([site]), Static().params([site])
    return dataclasses.replace(
        entry,
        macs=macs,
        params=params,
        macs_ratio=macs.total / plain.total,
        params_ratio=params / weights,
        placed=method.place(site)[1],
    ), bank


def tables(entries: Sequence[Entry], site: ConvSite) -> list[RenderableType]:
    """The comparison as text that fits 100 columns: costs and times, then papers, options and remarks."""
    return [_costs(entries, site), "", _remarks(entries)]


def _costs(entries: Sequence[Entry], site: ConvSite) -> Table:
    from rich.table import Table

    timed = any(entry.latency for entry in entries)
    title = f"{site.spec}, {site.positions:,} positions; the static convolution is 1"
    table = Table(title=title, title_justify="left", title_style="bold", min_width=len(title), **_STYLE)
    table.add_column("method", no_wrap=True)
    table.add_column("depends on the input")
    table.add_column("built by", no_wrap=True)
    for heading in ("conv", "kernels", "router", "MACs", "params", *(["time, b1"] if timed else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        first = (entry.name, entry.adapts or "-", entry.sharing)
        if entry.macs is None:
            table.add_row(*first, *["-"] * (5 + timed))
            continue
        one = entry.macs.total / (entry.macs_ratio or 1)
        parts = (entry.macs.conv, entry.macs.kernels, entry.macs.router)
        time = [f"{entry.latency.ratio:.2f}"] if entry.latency else []
        ratios = (f"{entry.macs_ratio:.3f}", f"{entry.params_ratio:.2f}")
        table.add_row(*first, *(_share(part / one) for part in parts), *ratios, *time)
    return table


def _share(value: float) -> str:
    if 0 < value < 0.0001:
        return "<0.0001"
    return "-" if value == 0 else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _remarks(entries: Sequence[Entry]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(**_STYLE)
    table.add_column("method", no_wrap=True)
    table.add_column("paper, options, remarks")
    for entry in entries:
        options = ", ".join(f"{key}={value!r}" for key, value in entry.options.items())
        lines = [
            entry.paper,
            options,
            entry.refused and f"not here: {entry.refused}",
            entry.placed and f"placed: {entry.placed}",
            *(f"exception: {clause.replace('_', ' ')}: {reason}" for clause, reason in entry.exceptions.items()),
        ]
        table.add_row(entry.name, Text("\n".join(filter(None, lines)) or "plain torch"))
    return table
