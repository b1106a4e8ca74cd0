"""Does the latency table predict whole networks? Predicted and measured time of students, static and dynamic.

Both are multiples of the original's time at batch 1, of networks whose BatchNorms are folded. Measured means: original
and student in turns, the median ratio of their times; on one thread the thread's own time, so that other processes on
the machine count little.

    python -m benchmarks.prediction                          # all networks, one thread; writes the CSV
    python -m benchmarks.prediction --only resnet20 --targets 50% --out /tmp/prediction.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dyncompress import files
from dyncompress.errors import BudgetError
from dyncompress.graph import ConvGraph
from dyncompress.latency import run
from dyncompress.latencytable import Device, LatencyTable, against_reference
from dyncompress.plan import Plan
from dyncompress.planning import make_plan
from dyncompress.prediction import Prediction, shipped, unchanged
from dyncompress.provenance import Environment
from dyncompress.tracing import trace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/prediction.csv"
NETWORKS = {"resnet20": 32, "resnet18": 224, "mobilenetv2_100": 224, "resnet50": 224}
TARGETS = ("75%", "50%", "33%", "20%")
METHODS = ("static", "dynet")
FIELDS = ("network", "method", "macs", "predicted", "measured", "error", "iqr")
WITHIN = 0.15


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights, in eval mode, and an image."""
    import_module("benchmarks.operators")  # before what imports torchvision, as torchmetrics does where it finds it
    torch.manual_seed(0)
    x = torch.randn(1, 3, NETWORKS[name], NETWORKS[name])
    if name == "resnet20":
        sys.path.append(str(ROOT / "recipes"))
        from cifar10 import ResNet

        return ResNet(20).eval(), x
    sys.path.append(str(ROOT / ".zoo"))
    import timm

    return timm.create_model(name).eval(), x


def measured(net: nn.Module, graph: ConvGraph, plan: Plan, x: torch.Tensor, seconds: float) -> tuple[float, float]:
    """Time of a plan's student over the original's, and the interquartile range of the rounds' ratios."""
    nets = [shipped(net, unchanged(graph)), shipped(net, plan)]
    timed = against_reference([lambda each=each: run(each, x) for each in nets], Device.here(), seconds)  # type: ignore[misc]
    ratios = [student / original for original, student in timed.rounds]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return statistics.median(ratios), high - low


def rows(
    name: str, targets: list[str], methods: list[str], table: LatencyTable, seconds: float
) -> Iterator[dict[str, Any]]:
    """One row per student."""
    net, x = build(name)
    graph = trace(net, x)
    prediction = Prediction(net, x, graph, table)
    for method in methods:
        for target in targets:
            try:
                plan = make_plan(net, x, target, method)
            except BudgetError:
                continue  # narrower than this network goes
            predicted = prediction.ratio(plan)
            ratio, iqr = measured(net, graph, plan, x, seconds)
            yield {
                "network": name,
                "method": method,
                "macs": f"{plan.ratio:.3f}",
                "predicted": f"{predicted:.3f}",
                "measured": f"{ratio:.3f}",
                "error": f"{predicted / ratio - 1:+.1%}",
                "iqr": f"{iqr:.3f}",
            }


def main() -> None:
    """Print and write predicted against measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="shares of the MACs")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=4.0, help="that a student is measured for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", help="folder of the latency table; default: the user's cache")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    console, found = Console(), []
    for name in asked.only:
        table = LatencyTable(folder=asked.table)
        for row in rows(name, asked.targets, asked.methods, table, asked.seconds):
            found.append(row)
            console.print("  ".join(f"{key} {value}" for key, value in row.items()), highlight=False)
            files.write_text(asked.out, text(found))
    errors = [abs(float(row["predicted"]) / float(row["measured"]) - 1) for row in found]
    within = sum(error <= WITHIN for error in errors)
    console.print(f"{within} of {len(errors)} within {WITHIN:.0%}; largest error {max(errors, default=0):.1%}")


def text(found: list[dict[str, Any]]) -> str:
    """The CSV, with where it comes from in its first line."""
    file = io.StringIO()
    command = ["python", "-m", "benchmarks.prediction", *sys.argv[1:]]
    file.write(f"# {Environment.here()}; {Environment.here(command).command}\n")
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()


if __name__ == "__main__":
    main()
