"""The command line: ``dyncompress plan | run | report | methods | presets``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from dyncompress import __version__
from dyncompress.allocator import keep_freed_memory
from dyncompress.budget import Budget
from dyncompress.comparison import compare, reference, tables
from dyncompress.errors import DynCompressError, RecipeError
from dyncompress.layers import get_method
from dyncompress.recipe import read_recipe

WIDTH = 120  # columns, where there is no terminal to ask
EPILOG = """examples:
  dyncompress plan recipes/digits.yaml --target 33%           what would become of every layer; nothing is trained
  dyncompress run recipes/digits.yaml --target 33% --epochs 5   compress, fine-tune, compare, report
  dyncompress run --help                                      every key of a recipe
  dyncompress report runs/                                    all results side by side
  dyncompress methods --channels 256 --size 14 --measure      what each method costs on a convolution, and takes
  dyncompress presets --method odconv                         networks of papers, by name"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words after ``dyncompress``; those of the process by default.

    Returns:
        Exit code: 0, or 2 after an error, which is one line on standard error.
    """
    parser = _parser()
    # A recipe's options are the recipe parser's business: whatever this parser does not know goes there.
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command in ("report", "methods", "presets"):
        parser.error(f"{arguments.command} does not take {' '.join(rest)}")
    try:
        if arguments.command == "plan":
            _plan(rest)
        elif arguments.command == "run":
            _run(rest)
        elif arguments.command == "report":
            _report(arguments.folder, arguments.out)
        elif arguments.command == "methods":
            _methods(arguments)
        else:
            _presets(arguments)
    except DynCompressError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"dyncompress: {error}")
        return 2
    return 0


def _console() -> Console:
    """Standard output, wide enough for the tables where it is a file or a pipe."""
    console = Console(file=sys.stdout)  # named, so that it stays the terminal while a training's output goes to a file
    return console if console.is_terminal else Console(file=sys.stdout, width=WIDTH)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dyncompress",
        description="Compress a trained CNN to a FLOPs target with dynamic convolutions.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dyncompress {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("plan", help="show what a target would do to a recipe's network", add_help=False)
    commands.add_parser("run", help="run a recipe: baseline, plan, fine-tuning, evaluation, report", add_help=False)
    report = commands.add_parser("report", help="compare the results of all runs in a folder", allow_abbrev=False)
    report.add_argument("folder", nargs="?", default="runs", help="where runs are, at any depth (default: runs)")
    report.add_argument("--out", default=None, help="picture of the trade-off (default: FOLDER/tradeoff.png)")
    methods = commands.add_parser("methods", help="compare the methods on one convolution", allow_abbrev=False)
    for option, (value, text) in {
        "channels": (64, "channels in and out"),
        "kernel": (3, "size of the kernel"),
        "size": (28, "pixels of an input's side"),
        "groups": (1, "groups of channels"),
        "dims": (2, "spatial dimensions"),
    }.items():
        methods.add_argument(f"--{option}", type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    methods.add_argument("--measure", action="store_true", help="time them on this machine, one thread, one image")
    methods.add_argument("--json", action="store_true", help="as JSON")
    presets = commands.add_parser("presets", help="list the networks of papers that have a name", allow_abbrev=False)
    presets.add_argument("--method", default=None, metavar="NAME", help="those of one method")
    return parser


def _plan(words: Sequence[str]) -> None:
    from dyncompress.planning import reachable
    from dyncompress.runner import telling, torch_threads
    from dyncompress.subject import Subject

    recipe = read_recipe(words, "dyncompress plan")
    if recipe.max_drop is not None:
        raise RecipeError(
            "max_drop takes trainings to find a plan - `dyncompress run` does them - or ask for a target, with"
            " --max_drop null --target 33%"
        )
    subject = Subject.of(recipe)
    network = subject.network(subject.model)
    console = _console()
    limits = () if recipe.target is None else Budget.parse(recipe.target).limits
    quantities = dict.fromkeys(["macs", *(limit.quantity for limit in limits)]) if recipe.preset is None else {}
    for quantity in quantities:  # of the method everywhere; a preset has it where the paper has it
        if quantity != "latency":
            reach = reachable(
                network, subject.example, recipe.method, options=recipe.options, ignore=recipe.ignore,
                static=recipe.static, floors=recipe.floors, quantity=quantity, target=recipe.target,
            )  # fmt: skip
            console.print(f"reachable with {recipe.method}: {reach}", highlight=False)
    keep_freed_memory()  # a plan for a time is measured as `run` will run it: the same threads, the same allocator
    with console.status("planning") as status, torch_threads(recipe.threads):
        plan = subject.plan(telling(status))
    console.print(plan.table())
    if recipe.out:
        plan.save(recipe.out)
        edit = "edit keep, method or options there and pass it as DynCompress(plan=...)"
        console.print(f"written to {recipe.out}; {edit}", highlight=False)


def _run(words: Sequence[str]) -> None:
    from dyncompress.runner import run_recipe

    recipe = read_recipe(words, "dyncompress run")
    keep_freed_memory()
    run_recipe(recipe, _console())


def _report(folder: str, out: str | None) -> None:
    from dyncompress.report import collect, tradeoff_plot, tradeoff_table

    reports = collect(folder)
    if not reports:
        raise RecipeError(f"no report.json below {folder!r} - a folder of runs - run a recipe first, or name its --out")
    console = _console()
    console.print(tradeoff_table(reports))
    path = tradeoff_plot(reports, out or Path(folder, "tradeoff.png"))
    console.print(f"plotted in {path}", highlight=False)


def _methods(arguments: argparse.Namespace) -> None:
    site = reference(arguments.channels, arguments.kernel, arguments.size, arguments.groups, arguments.dims)
    example = torch.randn(1, arguments.channels, *[arguments.size] * arguments.dims) if arguments.measure else None
    entries = compare(site, example=example)
    if arguments.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1) + "\n")
        return
    console = _console()
    for part in tables(entries, site):
        console.print(part, highlight=False)


def _presets(arguments: argparse.Namespace) -> None:
    from dyncompress.catalogue import preset_table
    from dyncompress.presets import list_presets

    if arguments.method is not None:
        get_method(arguments.method)
    presets = [preset for preset in list_presets() if arguments.method in (None, preset.method)]
    if not presets:
        have = ", ".join(sorted({preset.method for preset in list_presets()}))
        raise DynCompressError(f"method {arguments.method} has no preset; these have some: {have}")
    console = _console()
    console.print(preset_table(presets), highlight=False)
    console.print('\nfor a network of that form: preset: NAME in a recipe, DynCompress(preset="NAME")', highlight=False)
