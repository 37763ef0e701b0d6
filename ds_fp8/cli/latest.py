"""`ds_fp8 latest DIR`: the newest complete checkpoint in a folder, by name, on stdout.

Why newer ones were passed over goes to stderr. `--repair` makes DeepSpeed's `latest` name the one that was found, when
it is empty or names one that is incomplete or gone; a script that loads "the latest" then loads that one.

Exit code 0: found, or there is nothing to resume from yet (an empty line); 1: there are checkpoints, none is complete;
2: the folder cannot be read or written.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Find, tell, and on demand repair."""
    from ..checkpoint.complete import named_by_latest, tags
    from ..errors import printable

    parser = argparse.ArgumentParser(prog="ds_fp8 latest", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder, where DeepSpeed's `latest` lies")
    parser.add_argument("--repair", action="store_true", help="let `latest` name the newest complete checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if Path(options.folder).exists() and not Path(options.folder).is_dir():
        print(f"ds_fp8 latest: {options.folder}: a file; give the checkpoint folder", file=sys.stderr)
        return 2
    try:
        found, named = tags(options.folder), named_by_latest(options.folder)
    except OSError as error:
        print(f"ds_fp8 latest: {options.folder}: {error.strerror}", file=sys.stderr)
        return 2
    best = _chosen(found, named)
    if options.json:
        everything = [{**asdict(each), "complete": each.complete} for each in found]
        print(json.dumps({"tag": best.tag if best else None, "latest": named, "tags": everything}))
    else:
        print(best.tag if best else "")
    newer = found[: found.index(best)] if best else found
    for each in newer:
        why = "; ".join(each.faults[:3]) if each.faults else f"`latest` names {named}"
        print(printable(f"ds_fp8 latest: passed over {each.tag}: {why}"), file=sys.stderr)
    if best is None:
        if found or named is not None:
            print(f"ds_fp8 latest: {options.folder}: no complete checkpoint", file=sys.stderr)
        elif not Path(options.folder).is_dir():
            print(f"ds_fp8 latest: {options.folder}: no such folder yet, so nothing to resume from", file=sys.stderr)
        return int(bool(found))
    if named != best.tag:
        said = (
            "there is no `latest`" if named is None else f"`latest` names '{named}'" if named else "`latest` is empty"
        )
        if options.repair and not _repair(Path(options.folder), best):
            return 2
        did = f"it names {best.tag} now" if options.repair else f"`--repair` makes it name {best.tag}"
        print(printable(f"ds_fp8 latest: {options.folder}: {said}; {did}"), file=sys.stderr)
    return 0


def _chosen(found: Sequence, named: str | None):
    """The tag that `latest` names, where it is complete: the user may have turned back. Else the newest complete
    one.
    """
    complete = [each for each in found if each.complete]
    return next((each for each in complete if each.tag == named), complete[0] if complete else None)


def _repair(folder: Path, best) -> bool:
    """In one move, so that a rank that reads it meanwhile sees the old name or the new one."""
    new = folder / f".latest.{secrets.token_hex(8)}"
    try:
        with new.open("x", encoding="utf-8") as file:  # a link that somebody has put there is not followed
            file.write(best.tag)
        new.replace(folder / "latest")
    except OSError as error:
        print(f"ds_fp8 latest: {folder}/latest: cannot be written ({error.strerror})", file=sys.stderr)
        return False
    return True
