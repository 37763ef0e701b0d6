"""Write `ds_fp8.deepspeed-LINE.schema.json` for each release line of DeepSpeed: our schema with DeepSpeed's inside.

    python schemas/generate_bundled.py                 rewrite all
    python schemas/generate_bundled.py --stdout 0.19   print one
    python schemas/generate_bundled.py --from FILE     take a line's DeepSpeed part from FILE, which
                                                       generate_deepspeed.py has printed where the last release of that
                                                       line is installed

One file that refers to nothing outside, for editors, SchemaStore and validators that resolve no relative references.
Within a line of releases DeepSpeed only adds keys, so the last release's schema serves the line. The newest line comes
from `deepspeed.schema.json`; an older one has ended, and its DeepSpeed part is kept from its file.
`ds_fp8 schema` prints where the installed ones lie.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
LINES = ("0.18", "0.19")
"""Oldest first; the last one is the line of `deepspeed.schema.json`."""

OURS_ALONE = ("x-unit", "x-removed", "x-replacement", "x-tolerant", "x-deepspeed-version")
"""Keywords that only `ds_fp8 check` reads."""


def target(line: str) -> Path:
    """The file of a line, e.g. of `0.19`."""
    return FOLDER / f"ds_fp8.deepspeed-{line}.schema.json"


def line_of(version: str) -> str:
    """`0.19` of `0.19.8`."""
    return ".".join(version.split(".")[:2])


def read(path: Path) -> dict[str, Any]:
    """A schema."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def deepspeed_part(line: str, given: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's own schema at the last release of a line."""
    if given is not None:
        theirs = read(given)
        if line_of(theirs["x-deepspeed-version"]) == line:
            return theirs
    return (
        read(FOLDER / "deepspeed.schema.json") if line == LINES[-1] else read(target(line))["definitions"]["deepspeed"]
    )


def build(line: str, given: Path | None = None) -> dict[str, Any]:
    """Both schemas as one; DeepSpeed's is the definition `deepspeed`."""
    ours, theirs = read(FOLDER / "ds_fp8.schema.json"), deepspeed_part(line, given)
    version = theirs.get("x-deepspeed-version")
    if version is not None:
        theirs["description"] = f"DeepSpeed {version}; documentation: https://www.deepspeed.ai/docs/config-json/"
    for key in ("$id", "$schema"):
        theirs.pop(key, None)
    ours["$id"] = f"https://json.schemastore.org/{target(line).name.replace('.schema.json', '.json')}"
    ours["title"] = f"DeepSpeed {line} configuration with ds_fp8"
    ours["allOf"] = [{"$ref": "#/definitions/deepspeed"}]
    ours["definitions"]["deepspeed"] = theirs
    return without(ours, OURS_ALONE)


def without(node: Any, keywords: tuple[str, ...]) -> Any:
    """The same schema without these keywords; the cure of a key that is gone becomes its description."""
    if isinstance(node, dict):
        kept = {key: without(value, keywords) for key, value in node.items() if key not in keywords}
        if cure := node.get("x-removed"):
            kept["description"] = f"Removed: {cure}"
        elif replacement := node.get("x-replacement"):
            kept["description"] = f"Deprecated; use {replacement}"
        return kept
    return [without(value, keywords) for value in node] if isinstance(node, list) else node


def render(schema: dict[str, Any]) -> str:
    """Stable text, so that a regenerated file shows only what changed."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write one bundled schema for each release line of DeepSpeed.")
    parser.add_argument("--stdout", choices=LINES, help="print this line's instead of writing the files")
    parser.add_argument(
        "--from", dest="given", type=Path, help="DeepSpeed's part of its line, from generate_deepspeed.py"
    )
    options = parser.parse_args(argv)
    if options.stdout:
        sys.stdout.write(render(build(options.stdout, options.given)))
        return 0
    for line in LINES:
        text = render(build(line, options.given))
        target(line).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
