"""FLOPs cut, accuracy held, against controls that try hard: everything is trained alike and compared.

    python -m benchmarks.accuracy --tier cpu --data cifar10=FOLDER camvid=FOLDER --list   # what is missing
    python -m benchmarks.accuracy --tier cpu --data cifar10=FOLDER --only resnet20 --weights resnet20=FILE.pt
    python -m benchmarks.accuracy --tier cpu --data ... --plan      # plans for targets in time, when all is quiet
    python -m benchmarks.accuracy --tier cpu --time                 # time all students in turns, when all is quiet
    python -m benchmarks.accuracy --tier cpu --data ... --dependence   # what students owe to their input
    python -m benchmarks.accuracy                                   # tables and plots alone

A row is kept when it is there: stop and go on as you like. An original whose weights are not given is trained first. A
run that fails is told and counted, and the others go on. CPU tier: one thread each; GPU tier: the Trainer's "gpu", and
several runs side by side with --side-by-side N.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import dependence
from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.jobs import Job, Workshop, estimate, jobs, missing, store
from benchmarks.accuracy.networks import NETWORKS, TIERS, Case
from benchmarks.accuracy.page import PAGE, RESULTS, publish
from benchmarks.accuracy.races import race
from benchmarks.methods import times
from benchmarks.speed.timing import Effort
from benchmarks.trainings import ROOT
from dyncompress.allocator import keep_freed_memory

WORDS: dict[str, dict[str, Any]] = {
    "cpu": {"threads": 1},
    "gpu": {"threads": 1, "trainer": '{"accelerator": "gpu", "precision": "bf16-mixed"}'},
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns how many runs failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    cases = [case for case in TIERS[options.tier] if case.network in options.only]
    workshop = Workshop(
        out=options.out.resolve(),
        data=_named(options.data),
        weights=_named(options.weights),
        words=WORDS[options.tier],
        remember=options.tier == "cpu",
    )
    cases = [case for case in cases if not options.budgets or case.budget in options.budgets]
    cases = [case for case in cases if options.epochs in (None, case.epochs)]
    wanted = [
        job
        for job in jobs(cases, [ARMS[title] for title in options.arms])
        if options.seeds is None or job.seed in options.seeds
    ]
    stores = {name: store(options.results / f"{name}.csv") for name in NETWORKS}

    def keep(done: Sequence[Job]) -> None:
        for name in {job.case.network for job in done}:
            stores[name].put(workshop.finished([job for job in done if job.case.network == name]))

    keep(wanted)
    rows = [row for each in stores.values() for row in each.read()]
    rest = missing(wanted, rows)
    failed = 0
    if options.list:
        for job in rest:
            took = estimate(job, rows)
            _tell(f"{job}: {'unknown' if took is None else f'{took / 60:.0f} minutes'}")
        known = [took for job in rest if (took := estimate(job, rows)) is not None]
        _tell(f"{len(rest)} of {len(wanted)} missing; {sum(known) / 3600:.1f} hours for {len(known)} of them")
        return 0
    if options.data and options.dependence:
        for row in dependence.examined(workshop, wanted):
            dependence.store(options.results).put([row])
    elif options.data:
        here = [job for job in rest if job.network.data in workshop.data]
        if options.plan:
            here = [job for job in here if job.case.timed and job.seed == job.case.seeds[0]]
        failed = _work(workshop, here, workshop.plan if options.plan else workshop.run, keep, options.side_by_side)
    if options.time:
        _time(workshop, cases, options)
    for written in publish(options.results, options.page):
        _tell(f"wrote {written}")
    return failed


def _time(workshop: Workshop, cases: Sequence[Case], options: argparse.Namespace) -> None:
    """Time the students of all cases that have some."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as `dyncompress run` has it
    effort = Effort(rounds=options.rounds, seconds=options.seconds)
    for case in cases:
        path = options.results / f"{case.network}-times.csv"
        found = list(race(workshop, case, effort))
        if found:
            times.store(path).put(found)
            times.note(path, ["python", "-m", "benchmarks.accuracy", "--tier", options.tier, "--time"], effort)


def _work(
    workshop: Workshop, todo: Sequence[Job], do: Callable[[Job], int], keep: Callable[[list[Job]], None], lanes: int
) -> int:
    """Do jobs, several at a time; returns how many failed, an original that could not be trained being one."""
    failed, lost = 0, set()
    for network in dict.fromkeys(job.case.network for job in todo):
        if not workshop.checkpoint(network).exists():
            code = workshop.original(network)
            _tell(f"original of {network}: {f'exit status {code}' if code else 'done'}")
            if code:
                failed += 1
                lost.add(network)
    with ThreadPoolExecutor(lanes) as pool:
        for job, code in _done(pool, do, [job for job in todo if job.case.network not in lost]):
            _tell(f"{job}: {f'exit status {code}' if code else 'done'}")
            failed += bool(code)
            keep([job])
    return failed


def _done(pool: ThreadPoolExecutor, do: Callable[[Job], int], todo: Sequence[Job]) -> Iterator[tuple[Job, int]]:
    """Jobs and their exit status, as they end; those that share a plan wait for the first of them."""
    chains: dict[tuple[object, str], list[Job]] = {}
    for job in todo:
        chains.setdefault((job.case, job.arm.title), []).append(job)
    first = {pool.submit(do, chain[0]): chain for chain in chains.values()}
    later = {}
    for future in as_completed(first):
        chain = first[future]
        yield chain[0], future.result()
        later.update({pool.submit(do, job): job for job in chain[1:]})
    for future in as_completed(later):
        yield later[future], future.result()


def _named(pairs: Sequence[str]) -> dict[str, Path]:
    return {name: Path(path).resolve() for name, _, path in (pair.partition("=") for pair in pairs)}


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tier", choices=list(TIERS), default="cpu")
    add("--data", nargs="+", default=[], metavar="NAME=FOLDER", help="of the data sets cifar10 and camvid")
    add("--weights", nargs="+", default=[], metavar="NETWORK=FILE", help="of originals")
    add(
        "--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS)
    )
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=f"of {'; '.join(ARMS)}")
    add("--budgets", nargs="+", default=[], metavar="TARGET", help="of the tier's; all by default")
    add("--epochs", type=int, metavar="N", help="of the tier's; all by default")
    add("--seeds", type=int, nargs="+", metavar="N", help="of the tier's; all by default")
    add("--out", type=Path, default=ROOT / "runs/accuracy", help="folder of the runs")
    add("--side-by-side", type=int, default=1, metavar="N", help="runs at a time")
    add("--list", action="store_true", help="tell what is missing and how long it takes; do nothing")
    add("--plan", action="store_true", help="only make the plans for targets in time")
    add("--time", action="store_true", help="time the students in --out")
    add("--dependence", action="store_true", help="examine the students in --out; train nothing")
    add("--rounds", type=int, default=40, help="of a race, at most; at least 5")
    add("--seconds", type=float, default=40, help="of a race, after which no further round starts; 5 run in any case")
    add("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    add("--page", type=Path, default=PAGE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
