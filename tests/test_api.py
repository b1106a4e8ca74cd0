"""The public surface: what is listed here is kept, everything else may change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dyncompress

PUBLIC = [
    "DistillConfig",
    "DynCompress",
    "DynCompressError",
    "Plan",
    "Report",
    "convert",
    "evaluate",
    "export",
    "fold",
    "load",
    "load_from_checkpoint",
    "make_plan",
    "reuse_kernels",
    "save",
    "trace",
]
AUTHORS = {"ConvSpec", "DyNet", "DynamicConv", "Method", "Static", "list_methods", "register_method"}


def test_public_names_are_the_sorted_list() -> None:
    assert dyncompress.__all__ == PUBLIC == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_a_documented_object_of_the_package(name: str) -> None:
    value = getattr(dyncompress, name)
    assert callable(value), f"{name} is a {type(value).__name__}: does a module carry the same name?"
    assert value.__module__.startswith("dyncompress.")
    assert value.__doc__


def test_no_module_is_called_like_a_public_name() -> None:
    modules = {path.stem for path in Path(dyncompress.__path__[0]).iterdir()}
    assert modules.isdisjoint(PUBLIC)


def test_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"'compress'.*DistillConfig.*trace"):
        dyncompress.compress  # noqa: B018


def test_dir_lists_what_is_not_imported_yet() -> None:
    assert set(PUBLIC) <= set(dir(dyncompress))


def test_second_door_for_method_authors() -> None:
    import dyncompress.layers

    assert AUTHORS <= set(dyncompress.layers.__all__)
    assert list(dyncompress.layers.__all__) == sorted(dyncompress.layers.__all__)
    for name in dyncompress.layers.__all__:
        assert getattr(dyncompress.layers, name).__doc__, name


def test_module_is_the_command() -> None:
    """`python -m dyncompress` is the `dyncompress` command, also where scripts are not on the path."""
    run = subprocess.run([sys.executable, "-m", "dyncompress", "methods"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "dynet" in run.stdout
