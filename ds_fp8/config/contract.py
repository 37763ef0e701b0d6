"""The JSON Schemas, loaded once, and what they say about a key.

`schemas/ds_fp8.schema.json` is the truth about our two sections: keys, types, ranges, defaults, units, descriptions.
`schemas/deepspeed.schema.json` is generated from DeepSpeed's own models and serves `check` only; training relies on
the installed DeepSpeed's own validation instead, because that is never a version behind.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

SECTIONS = ("fp8", "msamp")

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def folder() -> Path:
    """Where the schemas lie: inside the installed package, or at the top level of a checkout."""
    inside = _PACKAGE / "schemas"
    return inside if inside.is_dir() else _PACKAGE.parent / "schemas"


@cache
def schema(name: str) -> dict[str, Any]:
    """A schema file as a dict; `name` is `ds_fp8` or `deepspeed`."""
    return json.loads((folder() / f"{name}.schema.json").read_text(encoding="utf-8"))


@cache
def schema_file(name: str) -> dict[str, Any]:
    """A generated table beside the schemas; `name` is `optimizers`."""
    return json.loads((folder() / f"{name}.json").read_text(encoding="utf-8"))


def definition(name: str) -> dict[str, Any]:
    """The schema of `fp8`, `msamp`, `layers` or `telemetry`."""
    return schema("ds_fp8")["definitions"][name]


def properties(name: str) -> dict[str, Any]:
    """The keys of a section and the schema of each."""
    return definition(name)["properties"]


def default(section: str, key: str) -> Any:
    """What a key means when it is absent or "auto"."""
    return properties(section)[key]["default"]


def validator(section: str) -> Any:
    """A jsonschema validator for one of our sections."""
    from jsonschema import Draft7Validator

    ours = schema("ds_fp8")
    # The reference into the sibling file is for editors: leave it out, so that nothing is ever looked up.
    return Draft7Validator({"$ref": f"#/definitions/{section}", "definitions": ours["definitions"]})


def deepspeed_validator() -> Any:
    """A jsonschema validator for DeepSpeed's own keys."""
    from jsonschema import Draft7Validator

    return Draft7Validator(schema("deepspeed"))
