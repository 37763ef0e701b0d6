"""What a save says of itself: the manifest of a tag, and the mark of a save that is under way. No torch.

`saving.py` writes both, `complete.py` and `verify` judge a folder by them, and every load compares: a file of another
save has another digest, though it reads well and has the right size. That is what finds a tag that holds files of two
steps, also where the files carry nothing of ours (`fp8` alone leaves the optimizer's shards to DeepSpeed).

A job without ds_fp8 that writes over the tag leaves the old manifest, and *none* of the files is then the one that it
lists: such a manifest counts no more. Where some are and some are not, files of two saves are mixed.
"""

from __future__ import annotations

import json
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
        manifest = json.loads((tag / MANIFEST).read_text(encoding="utf-8"))
        for entry in manifest["files"].values():
            int(entry["bytes"])
        int(manifest.get("step", 0))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
