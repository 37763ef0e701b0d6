"""`ds_fp8 schema`: where the JSON Schema of the whole file lies, for editors and other validators.

One file for each release line of DeepSpeed: its own keys and our two sections, without a reference to another file. In
VS Code, for example, `"json.schemas": [{"fileMatch": ["ds*.json"], "url": "<the printed path>"}]` gives completion and
checks; on a command line `check-jsonschema --schemafile "$(ds_fp8 schema)" ds.json` does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ..config import contract

NAME = re.compile(r"ds_fp8\.deepspeed-(\d+\.\d+)\.schema\.json")


def lines() -> dict[str, Path]:
    """Release line of DeepSpeed -> the file, oldest line first."""
    found = [(match[1], path) for path in contract.folder().iterdir() if (match := NAME.fullmatch(path.name))]
    return dict(sorted(found, key=lambda entry: tuple(map(int, entry[0].split(".")))))


def line_of(version: str) -> str:
    """`0.19` of `0.19.8`."""
    return ".".join(version.split(".")[:2])


def installed(known: Sequence[str]) -> str:
    """The line of the installed DeepSpeed; the newest where there is none, or one that has no file."""
    try:
        line = line_of(metadata.version("deepspeed"))
    except metadata.PackageNotFoundError:
        line = ""
    return line if line in known else known[-1]


def main(argv: Sequence[str]) -> int:
    """Print a path, or the text."""
    files = lines()
    parser = argparse.ArgumentParser(prog="ds_fp8 schema", description=__doc__.split("\n")[0])
    parser.add_argument("--print", action="store_true", dest="text", help="print the schema instead of its path")
    parser.add_argument(
        "--deepspeed",
        metavar="VERSION",
        type=line_of,
        choices=list(files),
        help=f"for another release than the installed one, of {', '.join(files)}",
    )
    options = parser.parse_args(list(argv))
    path = files[options.deepspeed or installed(list(files))]
    if options.text:
        sys.stdout.write(path.read_text(encoding="utf-8"))
    else:
        print(path)
    return 0
