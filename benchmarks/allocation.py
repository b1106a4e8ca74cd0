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
    """Print a line per network that a pattern matches, and the sum."""
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{'network':36}{'groups':>7}{'in reach':>10}{'landed':>8}{'median s':>10}{'longest':>9}")
    every: list[bool] = []
    longest = 0.0
    for name in (n for n in NETWORKS if any(fnmatchcase(n, pattern) for pattern in patterns)):
        try:
            groups, landed, seconds = measure(name)
        except DynCompressError as error:
            console.print(f"{name:36}{type(error).__name__}: {error}"[:120])
            continue
        every += landed
        slowest, middle = max(seconds, default=0.0), sorted(seconds)[len(seconds) // 2] if seconds else 0.0
        longest = max(longest, slowest)
        console.print(f"{name:36}{groups:7}{len(landed):10}{sum(landed):8}{middle:10.3f}{slowest:9.3f}")
    console.print(f"{'all':36}{'':7}{len(every):10}{sum(every):8}{'':10}{longest:9.3f}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["*"])
