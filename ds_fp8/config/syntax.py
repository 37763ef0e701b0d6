"""Why a text cannot be read as JSON, in words and with the place.

Parsers name the character at which they gave up, which is often far behind the slip: hjson reads `True}` as the text
"True}" and misses a brace at the end of the file. So the usual slips are looked for first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

PYTHON_WORDS = {
    "True": "write true, in lower case",
    "False": "write false, in lower case",
    "None": "write null",
    "NaN": "JSON has no NaN; write a number, or leave the key out",
    "nan": "JSON has no NaN; write a number, or leave the key out",
    "Infinity": "JSON has no infinity; write a large number, or leave the key out",
    "-Infinity": "JSON has no infinity; write a large number, or leave the key out",
    "inf": "JSON has no infinity; write a large number, or leave the key out",
}
_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/\*.*?\*/|[{}\[\]]|-?[A-Za-z]+', re.DOTALL)
_NUMBER = re.compile(r"\+?\.\d+|\+\d[\d.]*|0[xX][0-9a-fA-F]+|0\d[\d.]*")
"""Numbers as other languages write them."""
_COMMENT = re.compile(r"#|//|/\*")
_PAIRS = {"}": "{", "]": "["}


@dataclass(frozen=True)
class SyntaxProblem:
    """A reason and its place, both 1-based; 0 where the place is not known."""

    message: str
    line: int = 0
    column: int = 0


class Overflow(SyntaxProblem):
    """A number that no double holds: DeepSpeed's parser ends in an OverflowError there."""


class _TooLargeError(Exception):
    pass


def json_error(text: str) -> SyntaxProblem | None:
    """Why `text` is not strict JSON; None if it is."""
    try:
        json.loads(text, parse_constant=_constant, parse_float=_float)
    except json.JSONDecodeError as error:
        return _slip(text, error.pos) or SyntaxProblem(error.msg[0].lower() + error.msg[1:], error.lineno, error.colno)
    except _TooLargeError as error:
        line, column = _place(text, max(text.find(str(error)), 0))
        return Overflow(f"{error} is beyond the largest double, 1.8e308", line, column)
    except (ValueError, RecursionError) as error:
        return SyntaxProblem(str(error))
    return None


def _slip(text: str, at: int) -> SyntaxProblem | None:
    """A slip that the parser's words do not name: quotes of a word processor, numbers that JSON does not write so."""
    if text[at : at + 1] in ("\u201c", "\u201d", "\u2018", "\u2019"):
        return SyntaxProblem('these are quotes of a word processor; write straight quotes, "', *_place(text, at))
    for start in (at, at - 1):
        found = _NUMBER.match(text, max(start, 0))
        if found and not text[:start].endswith(tuple("0123456789.")):
            number = found.group()
            whole = int(number, 16) if number[:2] in ("0x", "0X") else number.lstrip("+0") or "0"
            cure = f"0{whole}" if str(whole).startswith(".") else str(whole)
            return SyntaxProblem(f"JSON does not write numbers as {number}; write {cure}", *_place(text, start))
    return None


def explain(text: str, error: Exception) -> SyntaxProblem:
    """Why `text` is not even hjson: the likeliest slip, else what the parser says (`error`)."""
    opened: list[tuple[str, int]] = []
    for found in _TOKEN.finditer(text):
        token = found.group()
        if token in PYTHON_WORDS and text[: found.start()].rstrip().endswith((":", ",", "[")):
            return SyntaxProblem(f"{token} is no JSON; {PYTHON_WORDS[token]}", *_place(text, found.start()))
        if token in "{[":
            opened.append((token, found.start()))
        elif token in _PAIRS:
            if not opened or opened[-1][0] != _PAIRS[token]:
                return SyntaxProblem(f"this {token} closes nothing that is open", *_place(text, found.start()))
            opened.pop()
    if opened:
        token, at = opened[-1]
        return SyntaxProblem(f"this {token} is never closed", *_place(text, at))
    strict = None if _COMMENT.search(text) else json_error(text)
    if strict is not None and strict.line:
        # Without a comment the text was meant as JSON, whose parser stops at the slip; hjson's reads on to the end.
        cure = "; a comma is missing before it" if strict.message.startswith("expecting ',' delimiter") else ""
        return SyntaxProblem(f"not readable as JSON: {strict.message}{cure}", strict.line, strict.column)
    line, column = getattr(error, "lineno", 0), getattr(error, "colno", 0)
    if isinstance(error, RecursionError):
        return SyntaxProblem("brackets are nested deeper than any configuration")
    reason = getattr(error, "msg", None) or f"{type(error).__name__}: {error}"
    return SyntaxProblem(f"not readable as JSON or hjson: {reason}", line, column)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; {PYTHON_WORDS[name]}")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _TooLargeError(text)
    return value


def _place(text: str, at: int) -> tuple[int, int]:
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
