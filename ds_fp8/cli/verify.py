"""`ds_fp8 verify DIR`: is every checkpoint in a folder whole, to the last bit? Reads all of it; torch is not needed.

DIR is the folder that `save_checkpoint` was given, or that of one tag in it.

For each tag: complete (`ds_fp8 latest` asks the same), every file the one that the manifest was written for, and every
record with the CRC-32 that torch.save has noted beside it. A checkpoint without a manifest (DeepSpeed's own, an older
version) is judged without it, a universal one by the parameters that its model file lists. Exit code 0: all whole; 2: a
fault, named on stdout; 2 too where there is nothing to verify.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .bars import shown_bytes


def main(argv: Sequence[str]) -> int:
    """Verify the tags of a folder, or one of them."""
    from ..checkpoint.complete import is_tag, look, tags
    from ..checkpoint.manifest import MANIFEST
    from ..checkpoint.universal import is_universal, look_universal
    from ..errors import printable

    parser = argparse.ArgumentParser(prog="ds_fp8 verify", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint folder, or one tag's")
    parser.add_argument("--tag", help="this one only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        what = "a file" if options.folder.exists() else "no such folder"
        print(f"ds_fp8 verify: {options.folder}: {what}; give what save_checkpoint was given", file=sys.stderr)
        return 2
    if options.tag is not None and not (options.folder / options.tag).is_dir():
        print(f"ds_fp8 verify: {options.folder / options.tag}: not there", file=sys.stderr)
        return 2
    folder = options.folder
    if options.tag is None and folder.is_dir() and (is_tag(folder) or is_universal(folder)):
        folder, options.tag = folder.resolve().parent, folder.resolve().name
    if options.tag is not None:
        found = [
            look_universal(folder / options.tag) if is_universal(folder / options.tag) else look(folder / options.tag)
        ]
    else:
        converted = sorted(tag for tag in folder.glob("*") if is_universal(tag))
        found = [*tags(folder), *map(look_universal, converted)]
    if not found:
        cure = "give the folder that save_checkpoint was given"
        print(f"ds_fp8 verify: {options.folder}: no checkpoint of DeepSpeed there; {cure}", file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    files = {each.tag: sorted((folder / each.tag).glob("**/*.pt")) for each in found}
    shown = shown_bytes([file for tag in files.values() for file in tag], "verifying")
    for each in found:
        tag = folder / each.tag
        faults = [*each.faults, *_content_faults(tag, itertools.islice(shown, len(files[each.tag])))]
        by = "manifest" if (tag / MANIFEST).is_file() else "its files, no manifest"
        results.append({"tag": each.tag, "step": each.step, "by": by, "faults": faults})
    shown.close()
    if options.json:
        print(json.dumps(results))
    else:
        for result in results:
            print(
                f"{printable(result['tag'])}: "
                + ("ok" if not result["faults"] else "DAMAGED")
                + f" (by {result['by']})"
            )
            for fault in result["faults"]:
                print(printable(f"  {fault}"))
    return 2 if any(result["faults"] for result in results) else 0


def _content_faults(folder: Path, files: Iterable[Path]) -> list[str]:
    """What neither sizes nor digests show: a flipped bit."""
    from ..checkpoint.records import check_records
    from ..errors import CheckpointError

    faults = []
    for file in files:
        try:
            check_records(file)
        except CheckpointError as error:
            faults.append(str(error).split("\n")[0].replace(f"{folder}/", ""))
    return faults
