"""Bit flips: torch.save writes a CRC32 of every record of its zip archive, and torch.load does not look at it.

So the check costs nothing at a save, covers everything in the file (weights, states, scales, DeepSpeed's own entries),
and works for old checkpoints too. At a load it reads the file once more, which takes about as long as torch.load does
(`benchmarks/bench_checkpoint.py`).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError

CHUNK_BYTES = 1 << 20
"""Read at once: what the second cache holds."""
HEADER = struct.Struct("<4s22xHH")
"""Before each record: signature, ..., bytes of the name, bytes of what follows it (APPNOTE.TXT 6.3.10, 4.3.7)."""
UTF8 = 0x800
"""Flag of a record whose name is UTF-8; else it is code page 437."""


def check_records(path: str | Path) -> None:
    """Raise CheckpointError if a record of the file at `path` is not what was written.

    A file of another format than torch's zip archives (an old torch, another checkpoint engine) is left alone; one that
    begins as such an archive and has no directory at its end was cut off.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise CheckpointError(f"{path}: no file, but a folder, a pipe or a device. Use an older tag.")
    if not zipfile.is_zipfile(path):
        if Path(path).is_file() and _begins_as_archive(path):
            raise CheckpointError(
                f"{path}: cannot be read: truncated ({Path(path).stat().st_size} bytes). Use an older tag."
            )
        return
    try:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with zipfile.ZipFile(path) as archive, Path(path).open("rb", buffering=0) as file:
            for record in archive.infolist():
                if _crc32(archive, record, file, buffer) != record.CRC:
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


def _crc32(archive: zipfile.ZipFile, record: zipfile.ZipInfo, file: BinaryIO, buffer: memoryview) -> int:
    """Of the bytes as they are stored; -1 where there is no such record.

    zipfile's own reader computes the same sum once more, and copies each chunk three times: a third of the speed.
    """
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        return _crc32_by_zipfile(archive, record)
    file.seek(record.header_offset)
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return -1
    signature, name_bytes, extra_bytes = HEADER.unpack(header)
    name = record.orig_filename.encode("utf-8" if record.flag_bits & UTF8 else "cp437")
    if signature != b"PK\x03\x04" or file.read(name_bytes) != name:
        return -1
    file.seek(extra_bytes, 1)
    found, left = 0, record.file_size
    while left:
        count = file.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            return -1
        found, left = zlib.crc32(buffer[:count], found), left - count
    return found


def _crc32_by_zipfile(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """It raises BadZipFile at the end of a record whose CRC is wrong."""
    found = 0
    try:
        with archive.open(record) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                found = zlib.crc32(chunk, found)
    except zipfile.BadZipFile:
        return -1
    return found
