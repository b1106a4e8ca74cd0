"""Does it work on mine? Runs dyncompress, and torch-pruning beside it, on the networks of `benchmarks.networks`.

Every network has a process of its own, one thread and a time limit, and its row is written as soon as it is there:

    python -m benchmarks.zoo                                  # the rows that benchmarks/results/zoo.json lacks
    python -m benchmarks.zoo --only 'timm/res*' 'smp/*' --fresh
    python -m benchmarks.zoo --peer                           # torch-pruning on the same networks
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.isolation import Job, warm

ROOT = Path(__file__).parents[1]
LIBRARIES = ROOT / ".zoo"
REQUIREMENTS = ROOT / "benchmarks/requirements.txt"
RESULTS = ROOT / "benchmarks/results/zoo.json"
_PRELOAD = ["benchmarks.operators", "timm", "torchvision.models", "segmentation_models_pytorch", "transformers"]


def environment(libraries: Path = LIBRARIES) -> dict[str, str]:
    """What the processes of the zoo see: their libraries behind a path of their own, one thread, no downloads."""
    paths = [str(ROOT), str(ROOT / "tests"), str(libraries), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }


def read(path: Path) -> dict[str, Any]:
    """Results so far."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {"provenance": {}, "ours": {}, "peer": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """All results; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    draft.replace(path)


def settle(row: dict[str, Any], targets: list[int]) -> dict[str, Any]:
    """A row as its process left it, with what the process couldn't say of itself."""
    ended = row.pop("ended", "")
    if ended:
        status = "hang" if "time limit" in ended else "crash"
        for target in map(str, targets):
            found = row.setdefault("targets", {}).setdefault(target, {"status": "running"})
            if found["status"] == "running":
                found |= {"status": status, "reason": f"{ended}, in '{row.get('phase', 'start')}'"}
    return row


def run(arm: str, names: list[str], targets: list[int], limit: float, jobs: int, path: Path, console: Console) -> None:
    """Try the networks, a few at a time, and write each row when it is there."""
    from benchmarks import ours, peer

    attempt = {"ours": ours.attempt, "peer": peer.attempt}[arm]
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = Job(attempt, (name, targets), limit)
        time.sleep(0.02)
        for name, job in list(running.items()):
            row = job.result()
            if row is None:
                continue
            del running[name]
            results = read(path)
            results[arm][name] = settle(row, targets)
            results["provenance"][arm] = provenance(limit, jobs)
            write(path, results)
            done = len(names) - len(waiting) - len(running)
            line = f"{done}/{len(names)} {summary(name, results[arm][name])}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary(name: str, row: dict[str, Any]) -> str:
    """One line on a network."""
    parts = []
    for target, found in row.get("targets", {}).items():
        reached = f" at {found['reached']:.1%} in {found['seconds']:.1f} s" if "reached" in found else ""
        parts.append(f"{target} %: {found['status']}{reached} {found.get('reason', '')}")
    return f"{name:45s} {row.get('error', '')}{' | '.join(parts)}"


def provenance(limit: float, jobs: int) -> dict[str, Any]:
    """Where the rows come from."""
    from dyncompress.provenance import Environment

    here = Environment.here()
    listed = (line.partition("==")[0] for line in REQUIREMENTS.read_text("utf-8").splitlines() if "==" in line)
    return {
        "date": here.date,
        "command": here.command,
        "hardware": here.hardware,
        "versions": {**here.versions, **{name: version(name) for name in listed}},
        "limit": limit,
        "jobs": jobs,
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="names; '*' is any text")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON; rows that are there are kept")
    parser.add_argument("--targets", type=int, nargs="+", help="percent of the MACs: 50 25, of the peer 50")
    parser.add_argument("--peer", action="store_true", help="torch-pruning instead of dyncompress")
    parser.add_argument("--fresh", action="store_true", help="also networks that have a row")
    parser.add_argument("--limit", type=float, default=120, help="seconds a network")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time; more than 1 spoils the seconds")
    parser.add_argument(
        "--libraries", type=Path, default=LIBRARIES, help="where benchmarks/requirements.txt is installed"
    )
    options = parser.parse_args(argv)
    if not options.libraries.is_dir():
        sys.exit(f"{options.libraries} is missing: the libraries of the zoo; `make .zoo/installed` makes them")
    os.environ.update(environment(options.libraries))
    sys.path[:0] = [str(ROOT / "tests"), str(options.libraries)]
    warm([*_PRELOAD, "benchmarks.peer" if options.peer else "benchmarks.ours"])

    from benchmarks.networks import NETWORKS

    arm = "peer" if options.peer else "ours"
    known = () if options.fresh else read(options.out)[arm]
    wanted = [n for n in NETWORKS if any(fnmatchcase(n, glob) for glob in options.only)]
    names = [name for name in wanted if name not in known]
    targets = options.targets or ([50] if options.peer else [50, 25])
    run(arm, names, targets, options.limit, options.jobs, options.out, Console())


if __name__ == "__main__":
    main()
