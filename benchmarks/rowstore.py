"""Rows of a dataclass in a CSV that grows: what is finished is there, and is not made again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from dyncompress import files

R = TypeVar("R")


class RowStore(Generic[R]):
    """A CSV with one row per key.

    Args:
        path: The file; it need not be there yet.
        kind: Dataclass of a row, whose fields are str, int or float, or one of these or None.
        key: The fields that tell one row from another.
    """

    def __init__(self, path: Path, kind: type[R], key: Sequence[str]) -> None:
        self.path, self.kind, self.key = path, kind, tuple(key)

    def read(self) -> list[R]:
        """All rows, in the order in which they came."""
        if not self.path.exists():
            return []
        kinds = {name: _kind(hint) for name, hint in get_type_hints(self.kind).items()}
        lines = csv.DictReader(io.StringIO(self.path.read_text("utf-8")))
        return [self.kind(**{name: _value(kinds[name], cell) for name, cell in line.items()}) for line in lines]

    def put(self, rows: Iterable[R]) -> None:
        """Add rows; one of the same key is replaced in its place. The file is written whole or not at all."""
        found = {self._key(row): row for row in [*self.read(), *rows]}
        if not found:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(self.kind)], lineterminator="\n")  # type: ignore[arg-type]
        writer.writeheader()
        for row in found.values():
            cells: dict[str, Any] = asdict(row)  # type: ignore[call-overload]
            # four digits of a time say more than it can be trusted in
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in cells.items()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(self.path, text.getvalue())

    def _key(self, row: R) -> tuple[Any, ...]:
        return tuple(getattr(row, name) for name in self.key)


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of a field, and whether it can be None."""
    options = get_args(hint)
    return (options[0], True) if options else (hint, False)


def _value(kind: tuple[type, bool], cell: str) -> Any:
    made, optional = kind
    return None if optional and cell == "" else made(cell)
