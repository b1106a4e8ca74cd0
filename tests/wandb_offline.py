"""Reads what an offline W&B run wrote: LevelDB log framing around protobuf records.

The file is flushed by `wandb.teardown()`; before it, the last records are missing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7  # a chunk never crosses a block; its header is crc (4), length (2), type (1)
FULL, FIRST, LAST = 1, 2, 4


@dataclass
class Run:
    id: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[tuple[str, str, list[str]]] = field(default_factory=list)  # type, name, files
    finished: bool = False


def records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little left for a header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts = b"" if kind in (FULL, FIRST) else parts
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)


def read(folder: Path) -> Run:
    """The single offline run below a folder."""
    (path,) = folder.rglob("run-*.wandb")
    run = Run(path.stem.removeprefix("run-"))
    for record in records(path):
        run.config |= _values(record.config.update) | _values(record.run.config.update)
        run.summary |= _values(record.summary.update) | _values(record.run.summary.update)
        if record.HasField("history"):
            run.history.append(_values(record.history.item))
        if record.HasField("artifact"):
            files = [entry.path for entry in record.artifact.manifest.contents]
            run.artifacts.append((record.artifact.type, record.artifact.name, files))
        run.finished |= record.HasField("exit")
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
