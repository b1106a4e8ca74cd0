"""Files are whole or not there: written in one step, and refused where a byte is not what was written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from textwrap import shorten
from typing import IO, Any

from dyncompress.errors import CheckpointError, WriteError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows; there what a killed writer left stays, for nothing tells it from a living writer's
    fcntl = None

_CHUNK = 1 << 20
_PART, _LOCK = ".part", "lock"
_SEAL = b'"dyncompress.sha256":"%s"'  # in a safetensors header; no tensor's name can imitate it, its quotes are escaped
_UNSEALED = "0" * 64
SEAL = {"dyncompress.sha256": _UNSEALED}  # metadata to write a file with that `seal` is to seal


# ---- writing -----------------------------------------------------------------------------------------------------


def write(path: str | Path, fill: Callable[[Path], Any]) -> None:
    """Write a file beside the target, then put it there in one step: after any crash the old file or the new one.

    What a killed process left beside the target is removed.

    Args:
        path: The target; its folder is made if need be.
        fill: Writes the file whose path it is given.

    Raises:
        WriteError: If the file can't be written; the old one, if any, is as it was.
    """
    path = Path(path).resolve()  # a link stays one: its target is replaced
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        with _part(path) as part:
            fill(part)
            part.chmod(part.with_name(_LOCK).stat().st_mode)  # some libraries make files that only their owner reads
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        raise WriteError(
            f"'{path}' can't be written ({error}); what was there before is unchanged. Free some space, or choose"
            " another place"
        ) from error


def write_text(path: str | Path, text: str) -> None:
    """`write` for text."""
    write(path, lambda part: part.write_text(text, "utf-8"))


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A place beside the target for the file to come, gone at the end with whatever else its writer put there.

    It is a folder with a locked file in it: so others know that its writer lives.
    """
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
    lock = None
    try:
        while lock is None:
            with suppress(FileExistsError):  # another writer looks whether its owner lives
                os.mkdir(folder)
            lock = _locked(folder)
        yield folder / f"part{path.suffix}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """The lock in a writer's folder, held until it is closed; None where another has it, or removed the folder."""
    file = folder / _LOCK
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(file)):  # else a lock on a file that was removed meanwhile
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _remove_leftovers(path: Path) -> None:
    """Remove what writers of this target left when they were killed: a lock goes with its process."""
    for folder in path.parent.glob(f".{escape(path.name)}.????????{_PART}") if fcntl is not None else ():
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _sync(folder: Path) -> None:
    """Have the folder's entries on the disk, too; Windows opens no folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- seals of safetensors files ----------------------------------------------------------------------------------


def seal(path: Path) -> None:
    """Put the hash of every other byte of a safetensors file into its header.

    Args:
        path: A file that was written with `SEAL` in its metadata.
    """
    with path.open("rb+") as file:
        header = _header(file)
        blank = _SEAL % _UNSEALED.encode()
        file.seek(8 + header.index(blank))
        file.write(_SEAL % _digest(file, header).encode())


def _check_seal(file: IO[bytes]) -> None:
    header = _header(file)
    try:
        stated = json.loads(header).get("__metadata__", {}).get(next(iter(SEAL)))
    except (ValueError, AttributeError, RecursionError):
        return  # no safetensors header: its reader says so
    if isinstance(stated, str):  # else somebody else's file
        blank = header.replace(_SEAL % stated.encode(), _SEAL % _UNSEALED.encode(), 1)
        if _digest(file, blank) != stated:
            raise ValueError("its contents don't match the hash that it was saved with")


def _header(file: IO[bytes]) -> bytes:
    """The header of a safetensors file; what there is of it, where its length is absurd."""
    file.seek(0)
    return file.read(min(int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size))


def _digest(file: IO[bytes], header: bytes) -> str:
    """Hash of the file with this header in place of its own."""
    at = file.tell()
    file.seek(0)
    digest = hashlib.sha256(file.read(8) + header)
    file.seek(len(header), os.SEEK_CUR)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    file.seek(at)
    return digest.hexdigest()


# ---- checks ------------------------------------------------------------------------------------------------------


def check(path: str | Path) -> None:
    """Refuse a damaged file where it carries the means to tell: a bundle's seal, the checksums of torch's archives.

    Neither safetensors nor ``torch.load`` compare weights with anything.

    Raises:
        CheckpointError: If a byte is not what was written.
    """
    try:
        with Path(path).open("rb") as file:
            if Path(path).suffix == ".safetensors":
                _check_seal(file)
            elif zipfile.is_zipfile(file):
                _check_archive(file)
    except (ValueError, OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"'{path}' can't be read ({error}); it is truncated, damaged or no checkpoint: take another copy"
        ) from None


def reason(error: Exception) -> str:
    """What a reader complains of, in a line: torch fills a screen where a file holds more than weights."""
    found = re.search(r"Weights only load failed.*GLOBAL ([\w.]+)", str(error), re.DOTALL)
    if found:
        return f"it holds an object of {found[1]}, whose code would run; only weights and plain values are read"
    return f"{type(error).__name__}: {shorten(str(error), 300, placeholder='...')}"


def _check_archive(file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(r.compress_type != zipfile.ZIP_STORED for r in records):  # a few bytes could stand for gigabytes
            raise ValueError("it holds compressed records, which torch does not write")
        if any(r.external_attr & 0x10 for r in records):  # torch would take its size for 0 and leave memory as it is
            raise ValueError("a record is marked as a folder, which torch does not write")
        if sum(r.file_size for r in records) > os.fstat(file.fileno()).st_size:
            raise ValueError("its records claim more bytes than it has")
        if any(r.CRC for r in records):  # torch.serialization.set_crc32_options(False) leaves them out
            broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"record '{broken}' does not match its checksum")
