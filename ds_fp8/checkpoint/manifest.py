"""What a save says of itself: the manifest of a tag, and the mark of a save that is under way. No torch.

`saving.py` writes both, `complete.py` and `verify` judge a folder by them, and every load compares: a file of another
save has another digest, though it reads well and has the right size. That is what finds a tag that holds files of two
steps, also where the files carry nothing of ours (`fp8` alone leaves the optimizer's shards to DeepSpeed).

A job without ds_fp8 that writes over the tag leaves the old manifest, and *none* of the files is then the one that it
lists: such a manifest counts no more. Where some are and some are not, files of two saves are mixed.
"""

from __future__ import annotations

import json
import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MANIFEST = "ds_fp8_manifest.json"
"""Written last, when all ranks are done: {"version": 1, "save_id": hex, "step": N, "files": {name: {"bytes": n,
"directory": crc}}}; see `saving.py`."""

UNFINISHED = "ds_fp8_unfinished"
"""A file that lies there while a save is under way: files of two steps may be mixed."""

CURE = f"If a file was changed on purpose, delete {MANIFEST}: the tag is then judged by its files."


MOST_TEXT_BYTES = 64 << 20
"""Of a manifest: some hundred bytes for each file."""


def read_text(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """A small file of text. OSError, or ValueError for one that is none: a pipe is never waited for, nor a device read
    without end, where somebody has put one into the folder.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("no file, but a folder, a pipe or a device")
    if state.st_size > most_bytes:
        raise ValueError(f"{state.st_size} bytes are too many")
    with path.open("rb") as file:
        return file.read(most_bytes).decode()


@dataclass(frozen=True)
class Compared:
    """Files of a tag beside its manifest.

    matching  how many are what the manifest lists
    faults    of the others, each a sentence that begins with the file's name
    """

    matching: int = 0
    faults: tuple[str, ...] = ()


def read_manifest(tag: Path) -> dict[str, Any] | None:
    """The manifest of a tag; None where there is none. CheckpointError if it cannot be read."""
    try:
        manifest = json.loads(read_text(tag / MANIFEST))
        for name, entry in manifest["files"].items():
            int(entry["bytes"])
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise ValueError(f"{name!r} is no file of this folder")
        int(manifest.get("step", 0))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{tag / MANIFEST}: cannot be read ({type(error).__name__}: {error}).\n  Use another tag. {CURE}"
        ) from error
    return dict(manifest)


def compare(tag: Path, manifest: dict[str, Any], names: Iterable[str]) -> Compared:
    """Look at the files `names`, which the manifest lists. Reads each archive's directory, not its content."""
    matching, faults = 0, []
    for name in names:
        fault = _fault(tag / name, name, manifest["files"][name])
        matching += fault is None
        if fault is not None:
            faults.append(fault)
    return Compared(matching, tuple(faults))


def _fault(file: Path, name: str, listed: dict[str, Any]) -> str | None:
    if not file.is_file():
        return f"{name}: missing, the manifest lists it"
    if file.stat().st_size != int(listed["bytes"]):
        return f"{name}: {file.stat().st_size} bytes, the manifest says {int(listed['bytes'])}"
    if listed.get("directory") is not None and directory_digest(file) != listed["directory"]:
        return f"{name}: not the file that the manifest was written for: another save's, or damaged"
    return None


def directory_digest(file: Path) -> int | None:
    """A CRC-32 of what the archive's own directory says: each record's name, size and CRC-32. None for other formats,
    and for a directory that cannot be read.

    Reads the directory only. Two saves have two digests unless they are equal to the byte.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = [
                f"{record.filename.partition('/')[2]} {record.file_size} {record.CRC}" for record in archive.infolist()
            ]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    return zlib.crc32("\n".join(records).encode(errors="surrogateescape"))
