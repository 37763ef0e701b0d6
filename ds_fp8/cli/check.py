"""`ds_fp8 check FILE...`: every problem at once, as `file:line:col: severity: path: message`.

The form is the one that editors and CI systems turn into links. Exit code 0: usable (warnings allowed); 1: errors
found; 2: a file could not be read at all. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .. import config
from ..errors import Problem, printable
from .given import document_of


def main(argv: Sequence[str]) -> int:
    """Check the files named in `argv`; the worst exit code wins."""
    parser = argparse.ArgumentParser(prog="ds_fp8 check", description=__doc__.split("\n")[0])
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="DeepSpeed configuration: a file, - for standard input, or base64 as DeepSpeed takes it",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per file")
    parser.add_argument("--strict", action="store_true", help="warnings count as errors")
    options = parser.parse_args(argv)
    return max(_check(name, options.json, options.strict) for name in options.files)


def _check(name: str, as_json: bool, strict: bool) -> int:
    document = document_of(name)
    name = "standard input" if name == "-" else name
    problems = config.check_document(document)
    code = exit_code(problems, strict)
    settings = config.load(document.data, where=name) if exit_code(problems, strict=False) == 0 else None
    if as_json:
        print(
            json.dumps(
                {"file": name, "code": code, "problems": [asdict(p) for p in problems], "settings": brief(settings)}
            )
        )
        return code
    for problem in problems:
        print(line(name, problem))
    if settings is None:
        errors = sum(problem.severity == "error" for problem in problems)
        print(f"{name}: {_count(errors, 'error')}, {_count(len(problems) - errors, 'warning')}")
    else:
        for note in settings.notes:
            if note not in map(str, problems):
                print(f"{name}: note: {note}")
        print(f"{name}: {'refused, warnings count (--strict)' if code else 'ok'}: {brief(settings)}")
    return code


def exit_code(problems: Sequence[Problem], strict: bool) -> int:
    """0 usable, 1 errors, 2 not readable; a problem without a path concerns the file itself."""
    if any(not problem.path and problem.severity == "error" for problem in problems):
        return 2
    return int(any(strict or problem.severity == "error" for problem in problems))


def line(name: str, problem: Problem) -> str:
    """One problem in one line, with as much of the place as is known."""
    place = f"{name}:{problem.line}:{problem.column}" if problem.line else name
    return printable(f"{place}: {problem.severity}: {problem}")


def brief(settings: config.Settings | None) -> Any:
    """What the file asks for, in one line."""
    if settings is None:
        return None
    parts = []
    if settings.fp8.enabled:
        implied = ", by msamp" if settings.fp8.implied else ""
        parts.append(f"fp8 ({settings.fp8.recipe}; backend {settings.fp8.backend}{implied})")
    if settings.msamp.level is not None:
        parts.append(f"msamp {settings.msamp.level.name}")
    if not parts:
        parts.append("unmodified DeepSpeed, neither fp8 nor msamp is on")
    return ", ".join([*parts, f"ZeRO {settings.deepspeed.zero_stage}", settings.deepspeed.dtype])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
