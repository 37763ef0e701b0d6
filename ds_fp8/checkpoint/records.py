"""Bit flips: torch.save writes a CRC32 of every record of its zip archive, and torch.load does not look at it.

So the check costs nothing at a save, covers everything in the file (weights, states, scales, DeepSpeed's own entries),
and works for old checkpoints too. At a load it reads the file once more, which takes about as long as torch.load does
(`benchmarks/bench_checkpoint.py`).
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from ..errors import CheckpointError

CHUNK_BYTES = 1 << 22


def check_records(path: str | Path) -> None:
    """Raise CheckpointError if a record of the file at `path` is not what was written.

    A file of another format than torch's zip archives (an old torch, another checkpoint engine) is left alone; one that
    begins as such an archive and has no directory at its end was cut off.
    """
    if not zipfile.is_zipfile(path):
        if Path(path).is_file() and _begins_as_archive(path):
            raise CheckpointError(
                f"{path}: cannot be read: truncated ({Path(path).stat().st_size} bytes). Use an older tag."
            )
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if _crc32(archive, record) != record.CRC:
                    raise CheckpointError(
                        f"{path}: the record {record.filename} is damaged (its CRC32 is not the one written beside "
                        "it).\n"
                        "  Use an older tag, or another copy of the file."
                    )
    except (zipfile.BadZipFile, OSError, zlib.error, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}). Use an older tag.") from error


def _begins_as_archive(path: str | Path) -> bool:
    with Path(path).open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"")  # nothing at all: cut off too


def _crc32(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Of the bytes as they are stored; zipfile itself raises BadZipFile at the end of a record whose CRC is wrong."""
    found = 0
    try:
        with archive.open(record) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                found = zlib.crc32(chunk, found)
    except zipfile.BadZipFile:
        return -1
    return found
