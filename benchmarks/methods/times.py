"""Times of students and of single layers, all forms in turns in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.methods.forms import FORMS
from benchmarks.rowstore import RowStore
from benchmarks.speed.timing import Effort
from benchmarks.trainings import STUDENT, commit
from dyncompress import files
from dyncompress.bundle import load
from dyncompress.comparison import compare, everywhere, reference, shipped
from dyncompress.conversion import convert, plan_of
from dyncompress.cost import count_params, measure_macs
from dyncompress.folding import fold
from dyncompress.latency import summarise
from dyncompress.prediction import unchanged
from dyncompress.provenance import Environment

BATCHES = (1, 32)
SHAPES = {"64 ch, 56x56": (64, 56), "128 ch, 28x28": (128, 28), "256 ch, 14x14": (256, 14)}  # channels, size


@dataclass(frozen=True)
class Time:
    """How long a form took.

    Attributes:
        subject: The network, or the shape of the layer.
        form: Title of a form, or "original".
        batch: Images.
        ms: Median time, in milliseconds.
        ratio: Median over the rounds of its time / the first form's in the same round.
        iqr: Interquartile range of those ratios; for the first form, of its times over their median.
        n: Rounds.
        macs: MACs / MACs of the first form.
        params: Parameters / parameters of the first form.
    """

    subject: str
    form: str
    batch: int
    ms: float
    ratio: float
    iqr: float
    n: int
    macs: float
    params: float


def store(path: Path) -> RowStore[Time]:
    """The rows in a CSV."""
    return RowStore(path, Time, ("subject", "form", "batch"))


def students(out: Path, network: Callable[[], nn.Module], subject: str, effort: Effort) -> list[Time]:
    """Every student in the runs' folders and the original, as they are shipped.

    Args:
        out: Folder of the runs' folders.
        network: Makes the original, trained or not.
        subject: What it is.
        effort: How long to measure.
    """
    example = torch.randn(1, 3, 32, 32)
    made = {
        t: load(out / f.folder / STUDENT, network()) for t, f in FORMS.items() if (out / f.folder / STUDENT).exists()
    }
    if not made:
        return []
    plan = plan_of(next(iter(made.values())))
    assert plan is not None
    before = convert(network(), unchanged(plan.graph))
    nets = {"original": before, **made}
    costs = {title: (measure_macs(net, example), count_params(net)) for title, net in nets.items()}
    return list(race({title: fold(net) for title, net in nets.items()}, example, subject, costs, effort))


def layers(effort: Effort) -> Iterator[Time]:
    """One layer of every form that can be there, built alone, also where it would not be placed."""
    for shape, (channels, size) in SHAPES.items():
        site = reference(channels, 3, size)
        entries = dict(zip(FORMS, compare(site, [form.made() for form in FORMS.values()]), strict=True))
        there = {title: entry for title, entry in entries.items() if not entry.refused}
        torch.manual_seed(0)
        nets = {title: shipped(everywhere(FORMS[title].made()).place(site)[0], site) for title in there}
        costs = {title: (entry.macs.total, entry.params or 0) for title, entry in there.items() if entry.macs}
        yield from race(nets, torch.randn(1, channels, size, size), shape, costs, effort)


def race(
    nets: Mapping[str, nn.Module],
    example: torch.Tensor,
    subject: str,
    costs: Mapping[str, tuple[int, int]],
    effort: Effort,
    batches: Sequence[int] = BATCHES,
) -> Iterator[Time]:
    """Times of networks in turns.

    Args:
        nets: By name; the first is what the others are compared with.
        example: One image.
        subject: What they have in common.
        costs: MACs and parameters of each.
        effort: How long to measure.
        batches: Sizes.
    """
    first = costs[next(iter(nets))]
    for batch in batches:
        x = example.expand(batch, *example.shape[1:]).contiguous()
        with torch.inference_mode():
            times = effort.race({title: partial(net, x) for title, net in nets.items()}).times
        for index, title in enumerate(nets):
            said, (macs, params) = summarise(times, index), costs[title]
            yield Time(
                *(subject, title, batch, said.median_ms, said.ratio, said.iqr, len(times)),
                macs=macs / first[0],
                params=params / first[1],
            )


def note(path: Path, command: list[str], effort: Effort) -> None:
    """Where a CSV's times come from, as JSON beside it."""
    here: dict[str, Any] = {**asdict(Environment.here(command)), "commit": commit()}
    here |= {"rounds": effort.rounds, "seconds": effort.seconds}
    files.write_text(path.with_suffix(".json"), json.dumps(here, indent=1) + "\n")
