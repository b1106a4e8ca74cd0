"""How long it takes to plan and to convert, on the processor that runs Python."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import dyncompress as dc
from benchmarks.speed.request import Request
from benchmarks.speed.rows import Row
from benchmarks.speed.subjects import METHOD, NETWORKS, TARGET, build


def measure(request: Request) -> Iterator[Row]:
    """`make_plan`, tracing included, and `convert`, of every network."""
    for name in NETWORKS:
        net, image = build(name, request.seed)
        make_plan = partial(dc.make_plan, net, image, TARGET, METHOD)
        arms = {"make_plan": make_plan, "convert": partial(dc.convert, net, make_plan())}
        yield from request.effort.time_once_each_way(arms).rows(subject=name, setting="planning", batch=1)
