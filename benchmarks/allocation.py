"""How often plans land within 1 % of their target where it is in reach, and how long choosing widths takes.

    PYTHONPATH=.zoo python -m benchmarks.allocation 'timm/resnet*' 'hand/*'      # names of benchmarks.networks

Every network is asked for 75, 50, 33 and 25 % of its MACs and of its parameters, with both methods and the two
allocations that need no data. One thread; tracing is not in the times.
"""

from __future__ import annotations

import itertools
import sys
import time
from fnmatch import fnmatchcase

import torch
from rich.console import Console
from rich.table import Table

import benchmarks.operators  # noqa: F401 - before anything imports torchvision
from benchmarks.networks import NETWORKS, build
from dyncompress.budget import Budget
from dyncompress.errors import DynCompressError
from dyncompress.layers import get_method
from dyncompress.planning import Problem
from dyncompress.tracing import trace

SHARES = (75, 50, 33, 25)


def measure(name: str) -> tuple[int, list[bool], list[float]]:
    """Width groups, whether each target in reach was landed on, and seconds per plan."""
    net, example = build(name)
    graph = trace(net, example)
    landed, seconds = [], []
    for method, quantity in itertools.product(("static", "dynet"), ("macs", "params")):
        problem = Problem(net, graph, get_method(method))
        reach = problem.reach(quantity)
        for share, allocation in itertools.product(SHARES, ("uniform", "importance")):
            if reach.lowest <= share / 100 * reach.original <= reach.highest:
                started = time.perf_counter()
                plan = problem.solve(Budget.parse(f"{share}% {quantity}"), allocation, 0.01)
                seconds.append(time.perf_counter() - started)
                ((_, asked, achieved),) = plan.asked
                landed.append(0.99 * asked <= achieved <= asked)
    return len(graph.groups), landed, seconds


def main(patterns: list[str]) -> None:
    """Print one row per network that a pattern matches, and the sum."""
    torch.set_num_threads(1)
    table = Table("network", "groups", "targets in reach", "landed", "seconds, median", "longest")
    every: list[bool] = []
    longest = 0.0
    for name in (n for n in NETWORKS if any(fnmatchcase(n, pattern) for pattern in patterns)):
        try:
            groups, landed, seconds = measure(name)
        except DynCompressError as error:
            table.add_row(name, "", "", str(error)[:60])
            continue
        if landed:
            every += landed
            longest = max(longest, *seconds)
            middle = sorted(seconds)[len(seconds) // 2]
            table.add_row(name, str(groups), str(len(landed)), str(sum(landed)), f"{middle:.3f}", f"{max(seconds):.3f}")
    table.add_row("all", "", str(len(every)), str(sum(every)), "", f"{longest:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or ["*"])
