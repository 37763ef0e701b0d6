"""`fp8.layers.include` and `exclude`: globs over module names, each of which must match something.

A filter that matches nothing is how a renamed head gets quantized without anybody noticing, so it is an error here,
with the closest names. How explicit a pattern is decides what happens to a module that cannot be converted:

    head             literal: the module itself was asked for, so any failed check is an error
    encoder.*.fc1    names it: a failed check of shape is an error, others keep it with the reason
    *                names nothing: failed checks keep modules with the reason
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import PlanError

WILDCARDS = "*?[]!"


@dataclass(frozen=True)
class ModuleNames:
    """One module that could be converted, as patterns see it."""

    fqn: str
    class_names: tuple[str, ...]


def is_literal(pattern: str) -> bool:
    return not any(sign in pattern for sign in WILDCARDS)


def names_something(pattern: str) -> bool:
    """False for `*`, `*.*` and the like: they ask for everything, so for nothing in particular."""
    return bool(pattern.strip(WILDCARDS + ".-_"))


def matches(pattern: str, module: ModuleNames) -> bool:
    """By name, or by class: `Linear`-like names without a dot also select a class."""
    return fnmatchcase(module.fqn, pattern) or pattern in module.class_names


def find(patterns: Sequence[str], module: ModuleNames) -> str | None:
    """The most explicit pattern that matches: literal before glob, class name last."""
    found = [pattern for pattern in patterns if matches(pattern, module)]
    found.sort(key=lambda pattern: (not is_literal(pattern), not names_something(pattern)))
    return found[0] if found else None


def unmatched(patterns: Iterable[str], modules: Sequence[ModuleNames]) -> list[str]:
    return [pattern for pattern in patterns if not any(matches(pattern, module) for module in modules)]


def no_match(key: str, pattern: str, modules: Sequence[ModuleNames], others: Sequence[tuple[str, str]]) -> PlanError:
    """The error for a pattern without a match.

    others  (fqn, class name) of all other modules: containers, embeddings, ...
    """
    head = (
        f"fp8/layers/{key}: {pattern!r} matches no Linear, Conv1D, experts or norm of this model, "
        "so it would do nothing."
    )
    for fqn, class_name in others:
        if fqn and fnmatchcase(fqn, pattern):
            inner = [module for module in modules if module.fqn.startswith(f"{fqn}.")]
            if inner:
                return PlanError(f"{head}\n  {fqn} ({class_name}) holds {len(inner)} of them; write '{pattern}.*'.")
            return PlanError(f"{head}\n  {fqn} ({class_name}) is never converted; remove the pattern.")
    names = [module.fqn for module in modules]
    close = difflib.get_close_matches(pattern.strip(WILDCARDS), names, n=3, cutoff=0.3)
    if not close:
        stem = pattern.strip(WILDCARDS + ".").split(".")[-1]
        close = [name for name in names if stem and stem in name][:3] or names[:3]
    return PlanError(f"{head}\n  Closest names: {', '.join(close) if close else 'none, the model has no such layers'}.")
