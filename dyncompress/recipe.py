"""A recipe: which network, which data, what target and how to get there, as a YAML file that a person edits.

Reading follows LightningCLI: classes by ``class_path`` and ``init_args``, any value changed on the command line
(``--epochs 2``, ``--data.root FOLDER``), an unknown key refused with the nearest known one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from dyncompress.allowance import Drop, SearchConfig
from dyncompress.budget import Budget
from dyncompress.compensation import WarmStart
from dyncompress.distillation import DistillConfig
from dyncompress.errors import RecipeError, shown
from dyncompress.layers import list_methods
from dyncompress.planning import asked_method, check_shares
from dyncompress.presets import find_preset


@dataclass(frozen=True)
class Baseline:
    """The network to compress.

    Args:
        checkpoint: File with its trained weights: a Lightning checkpoint or a state dict of the module or of its
            network. Without one the network is trained first.
        epochs: Epochs of that training.
    """

    checkpoint: str | None = None
    epochs: int = 10


@dataclass(frozen=True)
class Recipe:
    """Train or load a network, compress it, fine-tune it against the original, compare it with a static control.

    Args:
        model: The LightningModule: class_path and init_args (--model.NAME VALUE sets one of them).
        data: The LightningDataModule, likewise (--data.NAME VALUE).
        module: Name of the network in the LightningModule, where there are several.
        target: What the student may cost: 33%, 0.33, 1.2G, "350k params", "60% latency"; several limits as
            "33%, 50% params". Without one, a preset's widths.
        max_drop: Instead of a target: points of the validation score that may be lost, 1.0 say; the cheapest network
            within them is searched (docs/max_drop.md).
        search: How that search goes about it.
        method: What its convolutions become; `dyncompress methods` lists the names. auto by default.
        preset: Instead of a method: a paper's network, such as dy-resnet18; docs/presets.md lists the names.
        options: Options of the method.
        allocation: How widths share the budget: uniform, importance, or sensitivity (measured score drops).
        importance: Which channels stay: magnitude, bn (scales of BatchNorms) or taylor (change of the loss).
        batches: Training batches for taylor and sensitivity.
        ignore: Layers to leave alone, by name glob or type.
        static: Layers to narrow and leave static, likewise.
        floors: Layers and the output channels that each keeps at least, a number (24) or a share (0.5).
        warm_start: What student and control are before they are trained.
        warmup: Part of the fine-tuning in which layers become dynamic, 0.2 say; 0 for at once.
        distill: How the student learns from the original.
        baseline: The network to compress.
        epochs: Epochs of fine-tuning, for the student and the control alike.
        narrowing_steps: In how many steps each is narrowed, the epochs shared out among them; 1 for at once.
        seeds: One student and one control are fine-tuned per seed.
        score: Name under which the module's test step logs what to compare; higher is better.
        control: Also fine-tune the static network of the same MACs.
        trainer: Further arguments of Lightning's Trainer, such as accelerator or limit_train_batches.
        threads: CPU threads of torch; 0 leaves the choice to torch. Small networks are faster with 1.
        wandb: Project in Weights & Biases; null keeps W&B out. Offline unless a key is set.
        name: What the report calls it; the file's name when empty.
        folder: Where classes are looked for first; the file's folder when empty.
        out: Folder of the results; runs/NAME/TIME when empty. A run that was cut short goes on in its folder.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    target: str | float | tuple[str | float, ...] | None = None
    max_drop: float | str | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    method: str | None = None
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"
    importance: str = "magnitude"
    batches: int = 8
    ignore: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    floors: dict[str, int | float] = field(default_factory=dict)
    warm_start: WarmStart = field(default_factory=WarmStart)
    warmup: float = 0.0
    distill: DistillConfig = field(default_factory=DistillConfig)
    baseline: Baseline = field(default_factory=Baseline)
    epochs: int = 5
    narrowing_steps: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    score: str = "test_acc"
    control: bool = True
    trainer: dict[str, Any] = field(default_factory=dict)
    threads: int = 0
    module: str | None = None
    wandb: str | None = "dyncompress"
    name: str = ""
    folder: str = ""
    out: str = ""

    def __post_init__(self) -> None:
        paper = None if self.preset is None else find_preset(self.preset)
        drop = Drop.alone(self.max_drop, target=self.target, preset=self.preset)
        if drop is None and (self.target is not None or paper is None):
            Budget.parse(self.target)  # type: ignore[arg-type]  # what is no target is refused with what is one
        own = paper is not None and self.method == paper.method  # as a recipe says that was written by to_dict
        object.__setattr__(self, "method", asked_method(None if own else self.method, self.options, paper).name)
        check_shares(self.allocation, self.importance)
        least = {"epochs": (self.epochs, 1), "baseline.epochs": (self.baseline.epochs, 1), "threads": (self.threads, 0),
                 "batches": (self.batches, 1), "narrowing_steps": (self.narrowing_steps, 1)}  # fmt: skip
        for key, (count, lowest) in least.items():
            if count < lowest:
                raise RecipeError(f"{key} is {count} - a number from {lowest} - raise it")
        if self.narrowing_steps > self.epochs:
            raise RecipeError(
                f"narrowing_steps is {self.narrowing_steps} and epochs {self.epochs} - at least one epoch for each"
                " step - take fewer steps, or more epochs"
            )
        self.warm_start.within(batches=1, warmup=self.warmup)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise RecipeError(f"seeds are {list(self.seeds)} - distinct numbers from 0, at least one - correct them")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as written to the run's folder."""
        return asdict(self)


def recipe_parser(prog: str) -> ArgumentParser:
    """The command line of a recipe."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} RECIPE.yaml [--KEY VALUE ...]",
        description="Every KEY of the recipe can be changed on the command line.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", metavar="RECIPE.yaml", help="Same as RECIPE.yaml.")
    parser.add_class_arguments(Recipe, as_group=False)
    return parser


def read_recipe(words: Sequence[str], prog: str = "dyncompress run") -> Recipe:
    """Read a recipe and the changes to it.

    Args:
        words: As on the command line: the path of the YAML file, then options.
        prog: The command, for its help.

    Returns:
        The recipe; nothing has been built.

    Raises:
        RecipeError: If the file cannot be read, a key is not known, or a value has the wrong type.
    """
    words = list(words)
    if not words:
        raise RecipeError(f"no recipe is given - the path of a YAML file - such as {prog} recipes/digits.yaml")
    if not words[0].startswith("-"):
        words[:1] = ["--config", words[0]]
    elif words[0].startswith("--config="):
        words[:1] = words[0].split("=", 1)
    parser = recipe_parser(prog)
    path = words[1] if words[0] == "--config" and len(words) > 1 else ""
    if path:
        check_keys(_load(path), Recipe, f"{path}: ")
    for word in words:
        if word.startswith("--") and word not in ("--config", "--help") and not word.startswith("--print_config"):
            check_keys(_nested(word[2:].partition("=")[0].rstrip("+")), Recipe, f"option {word}: ")
    try:
        parsed = parser.parse_args(words)
    except (ArgumentError, TypeError, ValueError, AttributeError) as error:  # the last three slip out of jsonargparse
        reason = " ".join(str(error).split())[:500]
        raise RecipeError(f"{path or 'recipe'}: {reason} - see {prog} --help") from None
    return _from_namespace(parsed, Path(path))


def check_keys(values: object, kind: type, where: str) -> None:
    """Raise RecipeError at the first key that a dataclass, or one nested in it, does not have."""
    if not isinstance(values, Mapping):
        return
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise RecipeError(f"{where}unknown key {key!r}{suggest(key, hints)}")
        if is_dataclass(hints[key]):
            check_keys(value, hints[key], f"{where}{key}: ")


def build(component: Mapping[str, Any], what: str) -> Any:
    """Make the object that a ``class_path`` and its ``init_args`` describe.

    Args:
        component: ``{"class_path": "module.Class", "init_args": {...}}``; arguments may be components themselves.
        what: The recipe's key, for messages.

    Raises:
        RecipeError: If the class does not exist or does not take these arguments.
    """
    path = component.get("class_path")
    if not isinstance(path, str):
        raise RecipeError(f"{what} has no class_path - the dotted name of a class, such as digits.Digits - add it")
    cls = _import_class(path, what)
    parser = ArgumentParser(exit_on_error=False)
    arguments = parser.add_class_arguments(cls, fail_untyped=False)
    given = component.get("init_args", {})
    for key in given:
        if key not in arguments:
            raise RecipeError(f"{what}: {path} has no argument {key!r}{suggest(key, arguments)}")
    try:
        parsed = parser.parse_object(given)
    except ArgumentError as error:
        raise RecipeError(f"{what}: {' '.join(str(error).split())} - see the arguments of {path}") from None
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    return cls(**instantiate(parsed).as_dict())


def suggest(key: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, and all of them."""
    known = list(known)
    near = get_close_matches(str(key), known, 1, 0.5)
    return (f"; did you mean {near[0]!r}?" if near else "") + f" - allowed: {', '.join(known) or 'none'}"


@contextmanager
def importable(folder: str) -> Iterator[None]:
    """Modules of a folder can be imported, before those of the same name elsewhere; "" adds nothing."""
    entries = [str(Path(folder).resolve())] if folder else []
    sys.path[:0] = entries
    try:
        yield
    finally:
        for entry in entries:
            sys.path.remove(entry)


def _import_class(path: str, what: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        found = import_module(module)
    except (ImportError, ValueError) as error:
        raise RecipeError(
            f"{what}: {path!r} cannot be imported ({error}) - the dotted name of a class, in a module beside the "
            "recipe or installed - correct class_path or install what it needs"
        ) from error
    cls = getattr(found, name, None)
    if not isinstance(cls, type):
        own = [value for value in vars(found).values() if getattr(value, "__module__", "") == module]
        classes = [value.__name__ for value in own if isinstance(value, type)]
        raise RecipeError(f"{what}: module {module!r} has no class {name!r}{suggest(name, classes)}")
    return cls


def _load(path: str) -> object:
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path!r}: {error.strerror} - a YAML file - check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise RecipeError(f"recipe {path!r} holds {type(content).__name__} - keys and values, such as 'epochs: 5'")
    return content


def _nested(dotted: str) -> dict[str, Any]:
    """``"a.b"`` -> ``{"a": {"b": None}}``."""
    key, _, rest = dotted.partition(".")
    return {key: _nested(rest) if rest else None}


def _check_mapping(key: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{key} is {shown(value)} - keys and values, such as 'epochs: 5' - correct it")


def _refuse_null(kind: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """The parser lets ``epochs: null`` through, whatever the annotation says."""
    for key, annotation in get_type_hints(kind).items():
        if values.get(key, "") is None and NoneType not in get_args(annotation):
            raise RecipeError(f"{prefix}{key} is null - a value - give one, or leave the line out for the default")


def _from_namespace(parsed: Namespace, path: Path) -> Recipe:
    values = parsed.as_dict()
    values.pop("config", None)
    _refuse_null(Recipe, values)
    for key, kind in get_type_hints(Recipe).items():
        if isinstance(kind, type) and is_dataclass(kind):
            _check_mapping(key, values[key])
            _refuse_null(kind, values[key], f"{key}.")
            values[key] = kind(**values[key])
    for key in ("model", "data"):  # what stands beside init_args (--data.root X) belongs into it
        _check_mapping(key, values[key])
        _check_mapping(f"{key}.init_args", values[key].get("init_args", {}))
        cls, given, short = values[key].pop("class_path", None), values[key].pop("init_args", {}), values[key]
        values[key] = {"class_path": cls, "init_args": {**given, **short}}
    named = {"name": values["name"] or path.stem, "folder": values["folder"] or str(path.parent)}
    network = values["model"]["class_path"]
    if values["method"] not in list_methods() and isinstance(network, str):
        with importable(named["folder"]):  # a method of the user's own, which the network's module may register
            _import_class(network, "model")
    return Recipe(**{**values, **named})
