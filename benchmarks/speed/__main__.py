"""How fast is it? Measures what benchmarks/results/speed lacks, and writes docs/speed.md and its plots.

    make bench                                                     # all sections, on the CPU, one thread
    python -m benchmarks.speed --only networks training --fresh    # these, also where there are results
    python -m benchmarks.speed --only layers --odconv ~/ODConv --kernelwarehouse ~/KernelWarehouse
    python -m benchmarks.speed --device cuda --only layers networks
    python -m benchmarks.speed --only                              # nothing: page and plots alone

Each section has a process of its own, and its CSV is there when it is done: stop and go on as you like. The clones
are the authors' (see `benchmarks.speed.peers`); without them their columns are missing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.isolation import Job
from benchmarks.speed.modes import words
from benchmarks.speed.page import PAGE, RESULTS, publish
from benchmarks.speed.request import Request
from benchmarks.speed.section import ON_CPU_ONLY, SECTIONS, measure, name_of
from benchmarks.zoo import LIBRARIES, ROOT, environment

_PATH = [str(ROOT / "tests"), str(ROOT / "recipes"), str(LIBRARIES)]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns how many sections failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    chosen = [name for names in options.only for name in names]
    request = Request(
        device=options.device,
        threads=options.threads,
        rounds=options.rounds,
        seconds=options.seconds,
        seed=options.seed,
        modes=tuple(options.modes),
        odconv=options.odconv,
        kernelwarehouse=options.kernelwarehouse,
    )
    if not LIBRARIES.is_dir():
        sys.exit(f"{LIBRARIES} is missing: the libraries of the zoo; `make .zoo/installed` makes them")
    threads = str(request.threads)
    os.environ.update(environment() | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})
    sys.path[:0] = _PATH
    console = Console(highlight=False, soft_wrap=True)
    failed = 0
    for section in chosen:
        path = options.out / f"{name_of(section, request.device)}.csv"
        if request.device != "cpu" and section in ON_CPU_ONLY:
            console.print(f"{section}: runs on the CPU whatever the device; left out")
        elif path.exists() and not options.fresh:
            console.print(f"{section}: there already; --fresh measures it again")
        else:
            command = ["python", "-m", "benchmarks.speed", *argv]
            job = Job(measure, (section, request, command, not options.plain_malloc, options.out), options.limit)
            failed += not _wait(job, section, console)
    for written in publish(options.out, options.page):
        console.print(f"wrote {written}")
    return failed


def _wait(job: Job, section: str, console: Console) -> bool:
    started = time.monotonic()
    with console.status(section):
        while (found := job.result()) is None:
            time.sleep(0.5)
    seconds = time.monotonic() - started
    console.print(f"{section}: {found.get('rows', 0)} rows in {seconds:.0f} s {found['ended']}")
    return not found["ended"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="*", type=_sections, default=[list(SECTIONS)], help=f"some of {', '.join(SECTIONS)}")
    add("--fresh", action="store_true", help="also sections that have results")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--modes", nargs="+", type=_mode, default=[], help="such as fp32 or bf16+channels_last")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=20, help="of a race, at most; at least 5")
    add("--seconds", type=float, default=8, help="of a race, after which no further round starts; 5 run in any case")
    add("--seed", type=int, default=0)
    add("--odconv", type=Path, metavar="PATH", help="a clone of https://github.com/OSVAI/ODConv")
    add("--kernelwarehouse", type=Path, metavar="PATH", help="a clone of https://github.com/OSVAI/KernelWarehouse")
    add("--plain-malloc", action="store_true", help="leave the allocator as it is; `dyncompress run` keeps memory")
    add("--limit", type=float, default=1800, help="seconds a section")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    add("--page", type=Path, default=PAGE)
    return parser


def _sections(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"no section {shlex.join(unknown)}; there are {', '.join(SECTIONS)}")
    return names


def _mode(text: str) -> str:
    try:
        words(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


if __name__ == "__main__":
    sys.exit(main())
