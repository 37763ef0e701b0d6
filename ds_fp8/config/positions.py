"""Where each key stands in the text: hjson's parser gives values without places, this scanner gives the places.

It walks the same grammar as hjson (comments `#`, `//`, `/* */`; quoteless keys and strings; triple-quoted strings;
optional commas; optional outer braces) but builds no values: only a map from the path of a key to its line and column.
It never fails: where it does not understand the text it stops, and the problems found there carry no place.
Duplicate keys, which DeepSpeed refuses, are noted on the way.
"""

from __future__ import annotations

import bisect
import contextlib
import re
from dataclasses import dataclass, field

import hjson

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n\f\v\ufeff]+|#[^\n]*|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'', re.DOTALL)
_LITERAL = re.compile(r"(?:true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?=$|[,\]}\r\n#]|//|/\*)")
_BARE_KEY = re.compile(r"[^\s:,{}\[\]]+")
_NEWLINE = re.compile(r"\n")
_LINE = re.compile(r"[^\r\n]*")


class _LostError(Exception):
    """The text is not what the grammar expects here."""


@dataclass
class Positions:
    """Where things stand, as (line, column), both 1-based.

    keys        of each path
    duplicates  paths that occur twice, with the second place
    root        of the outermost object
    """

    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    duplicates: list[tuple[Path, tuple[int, int]]] = field(default_factory=list)
    root: tuple[int, int] = (0, 0)

    def find(self, path: Path) -> tuple[int, int]:
        """Place of `path`, or of its nearest ancestor that has one (the top of the object at last); (0, 0) without
        text.
        """
        for length in range(len(path), 0, -1):
            if path[:length] in self.keys:
                return self.keys[path[:length]]
        return self.root


def locate(text: str) -> Positions:
    """Scan hjson text for the places of its keys and list items."""
    scanner = _Scanner(text)
    with contextlib.suppress(_LostError, IndexError, RecursionError):
        scanner.read_root()
    return scanner.found


def unquote(text: str) -> str:
    """A quoted key without its quotes, escapes resolved as hjson does."""
    return hjson.loads(f"[{text}]")[0] if "\\" in text else text[1:-1]


class _Scanner:
    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.line_starts = [0, *(found.end() for found in _NEWLINE.finditer(text))]
        self.found = Positions()

    def read_root(self) -> None:
        self.skip_blank()
        self.found.root = self.place()
        if self.text[self.at] in "{[":
            self.read_value(())
        else:
            self.read_members((), closing=None)

    def read_value(self, path: Path) -> None:
        char = self.text[self.at]
        if char == "{":
            self.at += 1
            self.read_members(path, closing="}")
        elif char == "[":
            self.at += 1
            self.read_items(path)
        elif self.text.startswith("'''", self.at):
            self.at = self.text.index("'''", self.at + 3) + 3 if "'''" in self.text[self.at + 3 :] else len(self.text)
        elif char in "\"'":
            self.match(_STRING)
        elif literal := _LITERAL.match(self.text, self.at):
            self.at = literal.end()
        else:
            self.match(_LINE)  # a quoteless string runs to the end of the line

    def read_members(self, path: Path, closing: str | None) -> None:
        while True:
            self.skip_blank(commas=True)
            if self.at >= len(self.text):
                return
            if self.text[self.at] == closing:
                self.at += 1
                return
            place = self.place()
            if self.text[self.at] in "\"'":
                name = unquote(self.match(_STRING))
            else:
                name = self.match(_BARE_KEY)
            member = (*path, name)
            if member in self.found.keys:
                self.found.duplicates.append((member, place))
            self.found.keys[member] = place
            self.skip_blank()
            if self.text[self.at] != ":":
                raise _LostError
            self.at += 1
            self.skip_blank()
            self.read_value(member)

    def read_items(self, path: Path) -> None:
        index = 0
        while True:
            self.skip_blank(commas=True)
            if self.text[self.at] == "]":
                self.at += 1
                return
            item = (*path, index)
            self.found.keys[item] = self.place()
            self.read_value(item)
            index += 1

    def skip_blank(self, commas: bool = False) -> None:
        while True:
            # The pattern matches nothing too.
            self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if not (commas and self.text.startswith(",", self.at)):
                return
            self.at += 1

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise _LostError
        self.at = found.end()
        return found.group()

    def place(self) -> tuple[int, int]:
        line = bisect.bisect_right(self.line_starts, self.at)
        return line, self.at - self.line_starts[line - 1] + 1
