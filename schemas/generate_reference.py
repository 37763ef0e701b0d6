"""Write `docs/configuration.md`: every key of our sections, from the schema, where descriptions, defaults and units
stand.

python schemas/generate_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "docs" / "configuration.md"

HEAD = """# Configuration

Two sections in the DeepSpeed JSON; generated from `schemas/ds_fp8.schema.json` by `schemas/generate_reference.py`.

- Every key also takes `"auto"`: its default. Numbers may be written as `5e8`; a boolean in quotes is an error.
- Unknown keys are errors with a suggestion, misspelt section names (`fp-8`, `MS_AMP`) too. A misspelt top-level key of
  DeepSpeed (`zero_optimisation`) is an error in a job of ours; any other unknown top-level key is a note, because
  DeepSpeed lets scripts keep keys of their own there.
- A section must say `"enabled": true` or `false`. `msamp` alone turns FP8 products on as well;
  `"fp8": {"enabled": false}` beside it keeps them off.
- A file without both sections, or with both disabled, trains exactly as DeepSpeed does alone.
- `ds_fp8 check FILE` tells all problems at once as `file:line:col`, DeepSpeed's own keys included;
  `ds_fp8 explain FILE` shows every effective value and where it comes from.
- `"$schema": "PATH"` at the top of the file, with the path that `ds_fp8 schema` prints, lets editors complete and
  check while you type.
"""


def rows(definitions: dict[str, Any], name: str) -> list[str]:
    """One table."""
    section = definitions[name]
    lines = [
        f"## `{section['title']}`",
        "",
        section["description"],
        "",
        "| key | values | default | |",
        "|---|---|---|---|",
    ]
    for key, entry in section["properties"].items():
        if "$ref" in entry:
            inner = definitions[entry["$ref"].rsplit("/", 1)[1]]
            lines.append(
                f"| `{key}` | {'`true`, `false`, or ' if 'boolean' in inner['type'] else ''}object, see "
                f"[`{inner['title']}`](#{inner['title'].replace('.', '')}) | | {inner['description']} |"
            )
            continue
        default = json.dumps(entry["default"])
        lines.append(f"| `{key}` | {values(entry)} | `{default}` | {entry['description']} |")
    return [*lines, ""]


def values(entry: dict[str, Any]) -> str:
    """What a key takes, with range and unit; "auto" goes everywhere and is left out."""
    if "enum" in entry:
        return ", ".join(f"`{json.dumps(value)}`" for value in entry["enum"] if value != "auto")
    kind = next((kind for kind in _listed(entry["type"]) if kind != "string"), "text")
    if kind == "integer":
        unit = f" {entry['x-unit']}" if "x-unit" in entry else ""
        return f"{entry['minimum']} to {entry['maximum']}{unit}"
    if kind == "array":
        return f"list of {'true or false' if entry['items']['type'] == 'boolean' else 'text'}"
    return {"boolean": "`true`, `false`"}.get(kind, kind)


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def render() -> str:
    """The whole page."""
    definitions = json.loads((HERE / "ds_fp8.schema.json").read_text(encoding="utf-8"))["definitions"]
    lines = [HEAD]
    for name in ("fp8", "layers", "compile", "msamp", "telemetry"):
        lines += rows(definitions, name)
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
