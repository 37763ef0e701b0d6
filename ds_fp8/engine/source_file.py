"""The name of the JSON file, for messages: DeepSpeed gives its engine a dict without it.

Asked in this order, and only for messages:

    command line      --deepspeed_config ds.json, --deepspeed ds.json, as DeepSpeed and the Trainer read it
    environment       where `accelerate launch` and Lightning leave the name
    Trainer           TrainingArguments(deepspeed="ds.json"), found in the functions that are building this engine
    folder            the one JSON in the current folder, the script's, or among the arguments, that has these very
                      sections

A script that builds its dict itself has no file: then the messages say so.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .sections import sections_of

OPTIONS = ("--deepspeed_config", "--deepspeed", "--deepspeed-config")
VARIABLES = ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "PL_DEEPSPEED_CONFIG_PATH")
SUFFIXES = (".json", ".hjson")
NO_FILE = "the DeepSpeed configuration (a dict of the script)"

MOST_FILES, MOST_BYTES = 100, 100_000
"""A data folder holds thousands of JSON files, and none of a DeepSpeed configuration's size."""


def source_name(config: Any, arguments: list[str] | None = None) -> str:
    """A name for messages about `config`, the dict that an engine was given."""
    arguments = sys.argv if arguments is None else arguments
    found = (_of_command_line(arguments), _of_environment(), _of_trainer(), _of_folder(config, arguments))
    return next((name for name in found if name), NO_FILE)


def _of_command_line(arguments: list[str]) -> str | None:
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in OPTIONS:
            value = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
            if value and not value.startswith("-") and Path(value).suffix in SUFFIXES:
                return value
    return None


def _of_environment() -> str | None:
    names = (os.environ.get(variable, "") for variable in VARIABLES)
    return next((name for name in names if Path(name).suffix in SUFFIXES and Path(name).is_file()), None)


def _of_trainer() -> str | None:
    """The Trainer's own arguments remember what they were given."""
    frame = sys._getframe().f_back
    while frame is not None:
        name = getattr(getattr(frame.f_locals.get("self"), "args", None), "deepspeed", None)
        if isinstance(name, str) and Path(name).suffix in SUFFIXES:
            return name
        frame = frame.f_back
    return None


def _of_folder(config: Any, arguments: list[str]) -> str | None:
    sections = _sections(config)
    found = {path.resolve(): str(path) for path in _candidates(arguments) if _sections(_read(path)) == sections}
    return next(iter(found.values())) if len(found) == 1 and sections else None


def _candidates(arguments: list[str]) -> Iterator[Path]:
    yield from (Path(argument) for argument in arguments[1:] if Path(argument).suffix in SUFFIXES)
    for folder in (Path(), *([Path(arguments[0]).parent] if arguments and arguments[0] else [])):
        files = (path for path in folder.glob("*.*json") if path.suffix in SUFFIXES)
        yield from sorted(path for _, path in zip(range(MOST_FILES), files))


def _sections(config: Any) -> dict[str, Any]:
    """What is ours in it: a trainer has filled in the rest."""
    return {key: config[key] for key in sections_of(config)}


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
