"""What stands where a command wants a configuration: a file, base64 as DeepSpeed takes it, or `-` for standard
input.
"""

from __future__ import annotations

import sys

from .. import config
from ..config.source import Document


def document_of(name: str) -> Document:
    """Read it; never raises for what the user wrote."""
    if name != "-":
        return config.read(name)
    stream = sys.stdin
    raw = getattr(stream, "buffer", None)
    text = "" if stream is None else stream.read() if raw is None else raw.read().decode(errors="backslashreplace")
    return config.parse(text.removeprefix("\ufeff"), "standard input")
