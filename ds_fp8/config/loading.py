"""The two entry points: `load` for a job that is about to start, `check` for people who ask before.

Both collect every problem of the file. `load` looks at our sections, their misspellings and what they conflict with,
raises one `ConfigError` with all errors, and keeps warnings as `Settings.notes`. `check` judges DeepSpeed's own keys
besides, by the generated schema, and raises nothing.
"""

from __future__ import annotations

from ..errors import ConfigError, Problem
from . import contract
from .conflicts import CONFLICTS, REPLACED
from .deepspeed_keys import deprecated_keys, homes, judge_deepspeed, misspelt_keys, top_level_keys
from .messages import messages_of
from .refusals import refusals
from .resolve import settings_of, without_training
from .rules import ADVICE, RULES
from .sections import judge
from .settings import Settings
from .source import Document, Source, read


def load(source: Source, *, where: str | None = None, trains: bool = True) -> Settings:
    """Read and validate a configuration; raise ConfigError with all problems of our sections at once.

    source  a path, a dict, or URL-safe base64, as DeepSpeed takes
    where   what to call it in messages; the file's name by default
    trains  false for an engine without an optimizer: `msamp` is checked, and then has nothing to do
    A file without our sections gives settings with everything off.
    """
    return load_document(read(source, where), trains=trains)


def load_document(document: Document, *, trains: bool = True) -> Settings:
    """The same for a document that was read already."""
    problems = [*document.problems, *_own_problems(document, trains=trains)]
    if any(section in document.data for section in contract.SECTIONS):
        problems += [*deprecated_keys(document), *misspelt_keys(document)]
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        errors.sort(key=_place)
        raise ConfigError(document.name, errors)
    return settings_of(document.data, document.name, notes=tuple(str(problem) for problem in problems), trains=trains)


def check(source: Source, *, where: str | None = None) -> list[Problem]:
    """Every problem and warning, ours and DeepSpeed's own keys, in the order of the file."""
    return check_document(read(source, where))


def check_document(document: Document) -> list[Problem]:
    """The same for a document that was read already."""
    if not document.data and any(problem.severity == "error" for problem in document.problems):
        return document.problems
    found = [*document.problems, *_not_json(document), *_own_problems(document, asked=True), *judge_deepspeed(document)]
    seen: dict[tuple[str, str], Problem] = {}
    for problem in found:
        seen.setdefault((problem.path, problem.message), problem)
    return sorted(seen.values(), key=_place)


def _not_json(document: Document) -> list[Problem]:
    """A warning for hjson: DeepSpeed reads it, other readers of the same file do not."""
    found = document.not_json
    if found is None:
        return []
    message = f"hjson, but not JSON: {found.message}. The Trainer and Accelerate read JSON only"
    return [Problem("", message, found.line, found.column, "warning")]


def _place(problem: Problem) -> tuple[bool, int, int]:
    """In the order of the file; what has no place in it comes last."""
    return not problem.line, problem.line, problem.column


def _own_problems(document: Document, asked: bool = False, trains: bool = True) -> list[Problem]:
    data = document.data
    problems = [
        document.problem((key,), message, severity)
        for key, message, severity in judge(data, top_level_keys(), asked, homes())
    ]
    present = [section for section in contract.SECTIONS if section in data]
    for section in present:
        errors = sorted(
            contract.validator(section).iter_errors(data[section]), key=lambda error: list(map(str, error.path))
        )
        for error in errors:
            problems += [document.problem(path, message) for path, message in messages_of(error, (section,))]
    # Rules read values by their meaning, so they wait until every value has one.
    if present and not any(problem.path.split("/")[0] in present for problem in problems):
        in_force = data if trains else without_training(data)
        for rules, severity in ((RULES + CONFLICTS, "error"), (ADVICE + REPLACED, "warning")):
            problems += [
                document.problem(path, message, severity) for rule in rules for path, message in rule(in_force)
            ]
        settings = settings_of(data, document.name, trains=trains)
        problems += [document.problem(refusal.path, str(refusal)) for refusal in refusals(settings)]
    return problems
