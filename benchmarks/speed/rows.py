"""What was measured, as rows of a CSV; beside each CSV a JSON that says where its numbers come from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dyncompress import files


@dataclass(frozen=True)
class Row:
    """One thing that was measured.

    Attributes:
        subject: The network, or the shape of the layer.
        setting: What ran: "inference", "training step", ...
        mode: Words of `benchmarks.speed.modes`, such as "fp32" or "bf16+channels_last".
        batch: Images.
        arm: Whose time it is.
        base: Whose time ``ratio`` is taken to; for the base itself, its own name.
        ms: Median time, in milliseconds.
        ratio: Median over the rounds of arm / base within a round.
        iqr: Interquartile range of those ratios; for the base itself, of its times over their median.
        n: Rounds.
        macs: Multiply-adds of the arm as a fraction of the original's, where the subject is a network.
        error: Largest difference from torch's output, relative to the largest output, where that was compared.
    """

    subject: str
    setting: str
    batch: int
    arm: str
    base: str
    mode: str = "fp32"
    ms: float | None = None
    ratio: float | None = None
    iqr: float | None = None
    n: int | None = None
    macs: float | None = None
    error: float | None = None


_NAMES = [field.name for field in fields(Row)]
_WHOLE = {"batch", "n"}
_TEXT = {"subject", "setting", "arm", "base", "mode"}


@dataclass(frozen=True)
class Section:
    """Rows that were measured in one process.

    Attributes:
        name: "networks", or "networks-cuda" where they were measured on another device than the CPU.
        rows: What was measured.
        provenance: What `benchmarks.speed.section` records: environment, seed, rounds, seconds.
    """

    name: str
    rows: tuple[Row, ...]
    provenance: dict[str, Any]


def to_csv(rows: Iterable[Row]) -> str:
    """The text of a CSV; four digits of a time say more than it can be trusted in."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _NAMES, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    return text.getvalue()


def from_csv(text: str) -> tuple[Row, ...]:
    """Rows from the text that `to_csv` makes."""
    return tuple(
        Row(**{name: _value(name, cell) for name, cell in line.items()}) for line in csv.DictReader(io.StringIO(text))
    )


def _value(name: str, cell: str) -> Any:
    if name in _TEXT:
        return cell
    if cell == "":
        return None
    return int(cell) if name in _WHOLE else float(cell)


def write(folder: Path, section: Section) -> None:
    """The section's CSV, and its JSON; the CSV last: where it is, the section is done."""
    files.write_text(folder / f"{section.name}.json", json.dumps(section.provenance, indent=1) + "\n")
    files.write_text(folder / f"{section.name}.csv", to_csv(section.rows))


def read(folder: Path) -> dict[str, Section]:
    """All sections that are there, by name."""
    return {path.stem: _section(path) for path in sorted(folder.glob("*.csv"))}


def _section(path: Path) -> Section:
    provenance = json.loads(path.with_suffix(".json").read_text("utf-8"))
    return Section(path.stem, from_csv(path.read_text("utf-8")), provenance)
