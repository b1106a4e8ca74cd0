"""Compare all methods: CIFAR-10 ResNet-20 at equal MACs and equal distillation, and single layers.

    python -m benchmarks.methods --data FOLDER --weights FILE.pt     # train the forms that have no row yet
    python -m benchmarks.methods --time                              # time all students in turns, when all is quiet
    python -m benchmarks.methods --layers                            # time one layer of each at three shapes
    python -m benchmarks.methods                                     # rows, tables and plot alone

A run takes ten minutes on a CPU core; each row is kept when it is there: stop and go on as you like.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.methods import runs, times
from benchmarks.methods.forms import FORMS
from benchmarks.methods.page import PAGE, RESULTS, SUBJECT, publish
from benchmarks.speed.timing import Effort
from benchmarks.trainings import ROOT
from dyncompress.allocator import keep_freed_memory


def main(argv: list[str] | None = None) -> int:
    """The command line; returns how many runs failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    if (options.data is None) != (options.weights is None):
        _parser().error("training takes both --data and --weights")
    command = ["python", "-m", "benchmarks.methods", *argv]
    effort = Effort(rounds=options.rounds, seconds=options.seconds)
    failed = 0
    rows = runs.store(options.results / "cifar10_resnet20.csv")
    rows.put(runs.finished(options.out))
    if options.data is not None:
        request = runs.Request(
            data=options.data.resolve(),
            weights=options.weights.resolve(),
            out=options.out.resolve(),
            target=options.target,
            epochs=options.epochs,
            seeds=tuple(options.seeds),
        )
        for form in (FORMS[title] for title in options.only):
            if request.missing(form):
                code = request.train(form)
                sys.stdout.write(f"{form.title}: {f'exit status {code}' if code else 'done'}\n")
                sys.stdout.flush()
                failed += bool(code)
                rows.put(runs.finished(options.out))
    torch.set_num_threads(1)
    keep_freed_memory()  # as `dyncompress run` has it
    if options.time:
        sys.path.insert(0, str(ROOT / "recipes"))
        from cifar10 import ResNet  # type: ignore[import-not-found]

        path = options.results / "students.csv"
        times.store(path).put(times.students(options.out, ResNet, SUBJECT, effort))
        times.note(path, command, effort)
    if options.layers:
        path = options.results / "layers.csv"
        times.store(path).put(times.layers(effort))
        times.note(path, command, effort)
    for written in publish(options.results, options.page):
        sys.stdout.write(f"wrote {written}\n")
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="train.parquet and test.parquet of CIFAR-10")
    add("--weights", type=Path, metavar="FILE", help="of the original")
    add("--out", type=Path, default=ROOT / "runs/methods", help="folder of the runs")
    add("--target", default="33%")
    add("--epochs", type=int, default=4)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--only", nargs="+", choices=list(FORMS), default=list(FORMS), metavar="FORM", help=f"of {', '.join(FORMS)}")
    add("--time", action="store_true", help="time the students in --out")
    add("--layers", action="store_true", help="time single layers")
    add("--rounds", type=int, default=40, help="of a race, at most; at least 5")
    add("--seconds", type=float, default=40, help="of a race, after which no further round starts; 5 run in any case")
    add("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    add("--page", type=Path, default=PAGE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
