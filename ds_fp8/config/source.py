"""What DeepSpeed takes as a configuration, read the way DeepSpeed reads it.

A dict is used as it is. A string that names an existing file is read as hjson (JSON with comments, trailing commas and
quoteless strings), in which a duplicate key is an error. Any other string must be URL-safe base64 of such text.
Unreadable input becomes a `Problem`, so that `check` can report everything in one form. Text that is hjson but not JSON
gets a warning: Accelerate and the Trainer read the same file with `json.load`.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hjson

from ..errors import Problem
from . import syntax
from .positions import Path as KeyPath
from .positions import Positions, locate
from .values import kind_of

MOST_BYTES = 4 << 20
"""A larger file is no configuration."""


@dataclass
class Document:
    """A configuration as read.

    name       the file's name, or what to call it in messages
    data       the top-level keys; empty when it could not be read
    positions  places of the keys; empty when the source has no text
    problems   why it could not be read
    not_json   why the text, read as hjson, is not JSON besides; None if it is, or if there is no text
    """

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    positions: Positions = field(default_factory=Positions)
    problems: list[Problem] = field(default_factory=list)
    not_json: syntax.SyntaxProblem | None = None

    def problem(self, path: KeyPath, message: str, severity: str = "error") -> Problem:
        """A problem at a key, with the place of that key if the text is known."""
        line, column = self.positions.find(path)
        return Problem("/".join(str(part) for part in path), message, line, column, severity)


Source = str | os.PathLike[str] | dict[str, Any]


def read(source: Source, where: str | None = None) -> Document:
    """Read a configuration; never raises for what the user wrote, see `Document.problems`."""
    if isinstance(source, dict):
        return Document(where or "config", data=source)
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        return _unreadable(where or "config", f"{kind} is no configuration; give a file, a dict or a base64 string")
    try:
        exists, is_folder = Path(source).exists(), Path(source).is_dir()
    except (OSError, ValueError):  # longer than a file name may be, as base64 usually is; or a NUL byte
        exists = is_folder = False
    if is_folder:
        return _unreadable(where or os.fspath(source), "is a folder; give the JSON file in it")
    if exists:
        return _read_file(Path(source), where or os.fspath(source))
    return _read_base64(os.fspath(source), where)


def _read_file(path: Path, name: str) -> Document:
    """A file, or what the shell puts in place of one: a pipe, /dev/stdin."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        return _unreadable(name, f"cannot be read: {error.strerror}")
    if len(content) > MOST_BYTES:
        return _unreadable(name, f"is too large; a configuration has at most {MOST_BYTES >> 20} MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _unreadable(
            name, f"is not text in UTF-8 (byte {error.start} is {content[error.start]:#04x}); save it as UTF-8"
        )
    return parse(text.replace("\r\n", "\n").replace("\r", "\n"), name)


def _read_base64(text: str, where: str | None) -> Document:
    named_like_a_file = text.endswith((".json", ".hjson"))
    name = where or (text if named_like_a_file or len(text) < 40 else "base64 config")
    refusal = "no such file, and not base64 of a configuration either; check the path"
    try:
        # Strictly: the lenient decoder drops foreign letters, and a mistyped path would become an empty configuration.
        decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return _unreadable(name, refusal)
    document = parse(decoded, name, unique=False)
    if not document.data:
        return _unreadable(name, refusal)
    document.positions = Positions()  # lines of a text that the user never sees would mislead
    return document


def parse(text: str, name: str, *, unique: bool = True) -> Document:
    """Read the text of a file; `unique`: a key that is written twice is an error, as in a file of DeepSpeed's."""
    if not text.strip():
        return _unreadable(name, "is empty; a configuration is an object of keys, at least a batch size")
    not_json = syntax.json_error(text)
    if isinstance(not_json, syntax.Overflow):
        return Document(name, problems=[Problem("", not_json.message, not_json.line, not_json.column)])
    try:
        data = hjson.loads(text)
    except (ValueError, IndexError, RecursionError, OverflowError) as error:
        # hjson 3.1.0 runs over the end of an unclosed comment, and out of the stack in 1000 brackets.
        reason = syntax.explain(text, error)
        return Document(name, problems=[Problem("", reason.message, reason.line, reason.column)])
    if not isinstance(data, dict):
        return _unreadable(name, f"a configuration is an object of keys {{...}}, this is {kind_of(data)}")
    document = Document(name, data=data, positions=locate(text))
    if unique:
        for path, (line, column) in document.positions.duplicates:
            message = "written twice; DeepSpeed refuses duplicate keys, remove one"
            document.problems.append(Problem("/".join(map(str, path)), message, line, column))
        document.not_json = not_json
    return document


def _unreadable(name: str, message: str) -> Document:
    return Document(name, problems=[Problem("", message)])
