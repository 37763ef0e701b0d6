"""How messages show a value of JSON: as it stands in the file, and by its kind."""

from __future__ import annotations

import json
from typing import Any


def show(value: Any) -> str:
    """A value as it stands in JSON, shortened; strings in single quotes, as in the text around it."""
    if isinstance(value, str):
        return f"'{value if len(value) <= 60 else value[:57] + '...'}'"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: Any) -> str:
    """'a number', 'text', 'null': in JSON's terms, since the user wrote JSON."""
    if value is None:
        return "null"
    return next((name for kind, name in _KINDS if isinstance(value, kind)), f"a {type(value).__name__}")


def shown_with_kind(value: Any) -> str:
    """The value and its kind: 3 is a number; null is only called so once."""
    return "is null" if value is None else f"{show(value)} is {kind_of(value)}"


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"),  # before numbers: bool is an int
    ((int, float), "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (dict, "an object"),
)
