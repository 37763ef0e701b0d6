"""Messages for violations of the schema: what is wrong, what is allowed, and what to do.

One tiny function per JSON Schema keyword, all of one signature: they take jsonschema's error and yield a path and a
message. The errors come as objects with paths and are worded here, late, so that all of a file can be reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..levels import OPT_LEVELS
from . import contract
from .other_words import CURES, MOVED, SYNONYMS, VALUES
from .positions import Path
from .suggest import closest, did_you_mean, level_spelling
from .values import show, shown_with_kind

Messages = Iterator[tuple[Path, str]]

INNER = ("layers", "compile", "telemetry")
"""Objects inside a section."""


def messages_of(error: Any, section: Path) -> Messages:
    """All messages of one jsonschema error; paths start at the top of the file."""
    path = (*section, *error.absolute_path)
    yield from _MESSAGES.get(error.validator, _other)(error, path)


def _additional_properties(error: Any, path: Path) -> Messages:
    known = error.schema.get("properties", {})
    for key in error.instance:
        if not isinstance(key, str):
            yield (*path, key), "is no text, and JSON keys are text"
        elif key not in known:
            yield (*path, key), unknown_key(key, path, known)


def unknown_key(key: str, path: Path, known: dict[str, Any]) -> str:
    """Why `key` is refused below `path`, with the likeliest cure."""
    section = str(path[0]) if path else ""
    if (section, key) in MOVED:
        return MOVED[section, key]
    if guess := SYNONYMS[key] if SYNONYMS.get(key) in known else closest(key, known):
        return f"unknown key; did you mean '{guess}'?"
    if key == "enabled" and len(path) > 1:
        return "unknown key here; what this object sets is on where it stands, so leave 'enabled' out"
    ours = not section or section in contract.SECTIONS
    for other in (*INNER, *contract.SECTIONS) if ours else ():
        home = f"{section}/{other}" if other in INNER else other
        if (other in known or other in contract.SECTIONS) and home != section:
            if key in contract.properties(other):
                return f"unknown key here; it belongs to {home}"
            if SYNONYMS.get(key) in contract.properties(other):
                return f"unknown key here; it is '{SYNONYMS[key]}' in {home}"
    return f"unknown key; known are {', '.join(known)}"


def _required(error: Any, path: Path) -> Messages:
    for key in error.validator_value:
        if key not in error.instance:
            if key == "enabled":
                yield (
                    path,
                    "'enabled' is missing; write \"enabled\": true, or false to keep the section and leave it off",
                )
            else:
                yield path, f"'{key}' is missing"


def _enum(error: Any, path: Path) -> Messages:
    value, key = error.instance, str(path[-1]) if path else ""
    cure = CURES.get((key, value)) if isinstance(value, str) else None
    if cure:
        yield path, f"{show(value)} is not one of {', '.join(_choices(error))}: {cure}"
        return
    allowed = _choices(error)
    if isinstance(value, str) and value in allowed:
        yield path, f"{show(value)} is text; write {value} without quotes"
        return
    hint = ""
    if isinstance(value, str):
        meant = VALUES.get((key, level_spelling(value)))
        hint = f"; did you mean '{meant}'?" if meant in allowed else did_you_mean(value, allowed)
    if not hint and f"O{value}".replace("O0", "O") in allowed:
        hint = f'; write "O{str(value).lstrip("0")}"'
    if not hint and isinstance(value, str) and "," in value:
        hint = "; without quotes an hjson string runs to the end of the line: quote it"
    yield path, f"{show(value)} is not one of {', '.join(allowed)}{hint}"


def _choices(error: Any) -> list[str]:
    """The values to choose from; "auto" goes everywhere and is not repeated in every message."""
    return [
        choice if isinstance(choice, str) else json.dumps(choice)
        for choice in error.validator_value
        if choice != "auto"
    ]


def _type(error: Any, path: Path) -> Messages:
    value, wanted = error.instance, _wanted(error.schema)
    yield path, f"{shown_with_kind(value)}, expected {wanted}{_unquote(value, error.schema)}"


def _pattern(error: Any, path: Path) -> Messages:
    if error.validator_value != "^auto$":
        yield path, f"{show(error.instance)} does not match {error.validator_value}"
        return
    yield from _type(error, path)


def _minimum(error: Any, path: Path) -> Messages:
    yield path, f"{show(error.instance)} is less than the minimum of {error.validator_value}{_range(error.schema)}"


def _maximum(error: Any, path: Path) -> Messages:
    yield path, f"{show(error.instance)} is more than the maximum of {error.validator_value}{_range(error.schema)}"


def _exclusive_minimum(error: Any, path: Path) -> Messages:
    yield path, f"{show(error.instance)} must be more than {error.validator_value}"


def _items_count(error: Any, path: Path) -> Messages:
    if path and path[-1] == "override_linear_precision":
        yield path, f"{show(error.instance)} has {len(error.instance)} of 3 items: [fprop, dgrad, wgrad]"
    else:
        yield path, f"{show(error.instance)} has {len(error.instance)} items, allowed: {error.validator_value}"


def _min_length(error: Any, path: Path) -> Messages:
    yield path, "is empty; write a value, or leave the key out"


def _unique(error: Any, path: Path) -> Messages:
    twice = sorted({str(item) for item in error.instance if error.instance.count(item) > 1})
    yield path, f"{', '.join(show(item) for item in twice)} stands there twice; remove one"


def _removed(error: Any, path: Path) -> Messages:
    yield path, error.schema.get("x-removed", error.message)


def _other(error: Any, path: Path) -> Messages:
    yield path, error.message


_MESSAGES: dict[str, Callable[[Any, Path], Messages]] = {
    "additionalProperties": _additional_properties,
    "required": _required,
    "enum": _enum,
    "type": _type,
    "pattern": _pattern,
    "minimum": _minimum,
    "maximum": _maximum,
    "exclusiveMinimum": _exclusive_minimum,
    "minItems": _items_count,
    "maxItems": _items_count,
    "minLength": _min_length,
    "uniqueItems": _unique,
    "not": _removed,
}


def _types(schema: dict[str, Any]) -> list[str]:
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else list(types)
    if schema.get("pattern") == "^auto$":
        types.remove("string")
    return types


_NAMES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "an object {...}",
    "null": "null",
}


def _wanted(schema: dict[str, Any]) -> str:
    return " or ".join(_NAMES[name] for name in _types(schema) if name != "null") + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    unit = f" {schema['x-unit']}" if "x-unit" in schema else ""
    if "minimum" in schema and "maximum" in schema:
        return f" (allowed: {schema['minimum']} to {schema['maximum']}{unit})"
    return ""


def _keys(schema: dict[str, Any]) -> Iterable[str]:
    return (*schema.get("properties", ()), *schema.get("required", ()))


def _unquote(value: Any, schema: dict[str, Any]) -> str:
    """The cure for the commonest slip: a number or boolean in quotes."""
    types = _types(schema)
    if isinstance(value, str) and "boolean" in types and value.lower() in _TRUTHS:
        return f"; write {_TRUTHS[value.lower()]}, without quotes and in lower case"
    if isinstance(value, str) and ("integer" in types or "number" in types):
        try:
            float(value)
        except ValueError:
            return ""
        return f"; write {value} without quotes"
    if value in (0, 1) and not isinstance(value, bool) and "boolean" in types:
        return f"; write {'true' if value else 'false'}"
    if "object" in types and (written := _object(value, list(_keys(schema)))):
        return f"; write {json.dumps(written)}"
    if isinstance(value, str) and types == ["array"]:
        return f"; write [{json.dumps(value)}]"
    return ""


_TRUTHS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
"""Words for true and false."""


def _object(value: Any, keys: list[str]) -> dict[str, Any]:
    """The object of these keys that was meant by a single value; empty where nobody can tell."""
    if isinstance(value, bool):
        return {"enabled": value} if "enabled" in keys else {"device": "cpu"} if value and "device" in keys else {}
    if "stage" in keys:
        digits = [character for character in str(value) if character in "0123"]
        return {"stage": int(digits[-1])} if digits else {}
    if not isinstance(value, str):
        return {}
    if "opt_level" in keys and value.upper() in OPT_LEVELS:
        return {"enabled": True, "opt_level": value.upper()}
    if "device" in keys:
        return {"device": value}
    if "enabled" in keys:
        return {"enabled": value} if value == "auto" else {}
    return {"type": value} if "type" in keys else {}
