"""Train a recipe's original once, for all arms: `python -m benchmarks.accuracy.original RECIPE.yaml --out FOLDER`.

FOLDER/original.pt is there afterwards, unless the recipe names a checkpoint.
"""

from __future__ import annotations

import sys

from rich.console import Console

from dyncompress.allocator import keep_freed_memory
from dyncompress.recipe import importable, read_recipe
from dyncompress.runner import Run, torch_threads
from dyncompress.subject import Subject, quiet


def main(words: list[str]) -> int:
    """The command line."""
    recipe = read_recipe(words)
    keep_freed_memory()
    with torch_threads(recipe.threads):
        subject = Subject.of(recipe)
        with importable(recipe.folder), quiet(subject.lightning):
            Run.begin(subject, Console()).original()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
