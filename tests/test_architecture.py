"""One direction: a module imports only those above it in this list, so there is no cycle and no back door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = """
    errors files typed
    layers.channels layers.options layers.spec layers.method layers.mixing layers.recompute layers.fused
    layers.execution layers.router layers.static layers.tokens layers.placement layers.warmstart layers.annealing
    layers.sharedbank layers.inference layers.dynet layers.condconv layers.dyconv layers.odconv layers.dcd
    layers.drconv layers.dyco3d layers.c2sp layers.partition layers.warehouse layers.kernelwarehouse
    layers.auto layers
    ops labels memory narrowing sites recording propagation movement products rules audit graph grouping standins
    sharing tracing cost importance marginal budget planfile plan
    allocation knapsack selection ridge samples compensation reconstruction conversion gradual folding losses answers
    distillation hints
    latency evaluation taylor ranking sensitivity allocator provenance latencytable prediction worth pacing
    roles warehouses presets planning allowance search
    plotting arms report tracking bundle formats exporting checkpoint
    host schedules student patch restoring teachers inputs teaching probing callback
    recipe subject loggers runner comparison catalogue cli __main__
""".split()
HOST = "callback"  # the first module that may know Lightning or W&B; those above it work on any torch network
HOSTS = {"lightning", "pytorch_lightning", "wandb"}
LINES = 400
NOT_INSTALLED = {"recipes", "tests", *(path.stem for path in (ROOT / "recipes").glob("*.py"))}

MODULES = {
    ".".join(path.relative_to(ROOT / "dyncompress").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dyncompress").rglob("*.py"))
    if path != ROOT / "dyncompress/__init__.py"  # maps public names to modules: knows all, imports none
}
FILES = sorted(path for folder in ("dyncompress", "recipes", "tests") for path in (ROOT / folder).rglob("*.py"))


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names that the source imports anywhere, also inside functions; relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def known(name: str) -> str:
    """The module of this package that a dotted name lies in: "dyncompress.layers.DyNet" -> "layers"."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in ORDER:
        parts.pop()
    return ".".join(parts)


def faults(module: str, source: str, package: str) -> list[str]:
    """Imports of a module that its place in the order forbids."""
    if module not in ORDER:
        return [f"{module} has no place in ORDER"]
    found = []
    for name in imports(source, package):
        top = name.split(".")[0]
        if top in HOSTS and ORDER.index(module) < ORDER.index(HOST):
            found.append(f"{module} knows {top}")
        if top in NOT_INSTALLED:
            found.append(f"{module} imports {name}, which is not installed")
        if top == "dyncompress" and name != "dyncompress.__version__":
            target = known(name)
            if target not in ORDER or ORDER.index(target) >= ORDER.index(module):
                found.append(f"{module} imports {name}, which does not come before it")
    return found


def test_order_lists_the_modules_that_are_there_once_each() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_comes_before(module: str) -> None:
    path = MODULES[module]
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = faults(module, path.read_text("utf-8"), package)
    assert not found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors", "import dyncompress.graph"),
        ("graph", "from dyncompress import plan"),
        ("graph", "from .callback import DynCompress"),
        ("graph", "from dyncompress import make_plan"),
        ("plan", "def f():\n    import wandb"),
        ("plan", "from lightning.pytorch import Trainer"),
        ("cli", "from recipes import digits"),
    ],
)
def test_a_planted_fault_is_found(module: str, line: str) -> None:
    assert len(faults(module, line, "dyncompress")) == 1


def test_a_lawful_import_is_let_through() -> None:
    lines = "from . import errors\nfrom dyncompress.layers import DyNet\nimport wandb\nimport lightning.pytorch"
    assert not faults("cli", lines, "dyncompress")
    assert not faults(
        "layers.dynet",
        "from ..errors import DynCompressError\nfrom .spec import ConvSpec",
        "dyncompress.layers",
    )


def silences(source: str) -> list[int]:
    """Lines where any error is caught and nothing is done about it."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_named_for_one_idea_and_hides_no_error(path: Path) -> None:
    source = path.read_text("utf-8")
    assert len(source.splitlines()) <= LINES
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc", "base", "core"}
    assert not silences(source)


def test_a_silenced_error_is_found() -> None:
    assert silences("try:\n    f()\nexcept Exception:\n    pass") == [3]
    assert not silences("try:\n    f()\nexcept ImportError:\n    pass")
