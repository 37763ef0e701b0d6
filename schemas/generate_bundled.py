"""Write `ds_fp8.bundled.schema.json`: our schema with DeepSpeed's inside, one file that refers to nothing outside.

    python schemas/generate_bundled.py            rewrite the file
    python schemas/generate_bundled.py --stdout   print it

For editors and for validators that resolve no relative references. `ds_fp8 schema` prints where the installed one lies.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
TARGET = FOLDER / "ds_fp8.bundled.schema.json"


def build() -> dict[str, Any]:
    """Both schemas as one; DeepSpeed's is the definition `deepspeed`."""
    ours = json.loads((FOLDER / "ds_fp8.schema.json").read_text(encoding="utf-8"))
    theirs = json.loads((FOLDER / "deepspeed.schema.json").read_text(encoding="utf-8"))
    for schema in (ours, theirs):
        schema.pop("$id", None)
    theirs.pop("$schema", None)
    ours["allOf"] = [{"$ref": "#/definitions/deepspeed"}]
    ours["definitions"]["deepspeed"] = theirs
    return ours


def render(schema: dict[str, Any]) -> str:
    """Stable text, so that a regenerated file shows only what changed."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write ds_fp8.bundled.schema.json from the two schemas.")
    parser.add_argument("--stdout", action="store_true", help="print instead of writing the file")
    text = render(build())
    if parser.parse_args(argv).stdout:
        sys.stdout.write(text)
    else:
        TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
