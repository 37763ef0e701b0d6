"""DeepSpeed's own keys, judged by the generated schema.

DeepSpeed accepts any top-level key, and ignores unknown keys in some sections. In others its models refuse them, but
one at a time and only after the processes have started. Here all findings come at once. What DeepSpeed would refuse is
an error; what it would ignore, convert or has deprecated is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from ..errors import Problem
from . import contract
from .hyperparameters import judge_hyperparameters
from .messages import messages_of
from .positions import Path
from .source import Document

COMPUTED_WITH = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "steps_per_print",
    }
)
"""Numbers that no model of DeepSpeed's converts: as text they end the job in a TypeError."""


@cache
def top_level_keys() -> frozenset[str]:
    """Every top-level key that DeepSpeed knows or knew."""
    return frozenset(contract.schema("deepspeed")["properties"])


@cache
def homes() -> dict[str, str]:
    """Key that only one of DeepSpeed's sections has -> that section; general words (`enabled`, `type`) are left out."""
    found: dict[str, set[str]] = {}
    for section, entry in contract.schema("deepspeed")["properties"].items():
        for key in entry.get("properties", {}):
            found.setdefault(key, set()).add(section)
    general = {"enabled", "type", "params", "seed", "profile", "writer", "group", "project", "team", "workspace"}
    top = top_level_keys()
    for key in ("lr", "betas", "eps", "weight_decay"):
        found[key] = {"optimizer/params"}
    return {
        key: next(iter(sections))
        for key, sections in found.items()
        if len(sections) == 1 and key not in general and key not in top
    }


def judge_deepspeed(document: Document) -> Iterator[Problem]:
    """Problems in DeepSpeed's own sections, with severity."""
    yield from _by_schema(document)
    yield from deprecated_keys(document)
    yield from (document.problem(path, message) for path, message in _contradictions(document.data))
    yield from (document.problem(path, message) for path, message in judge_hyperparameters(document.data))
    yield from (document.problem(path, message, "warning") for path, message in _dropped(document.data))


def misspelt_keys(document: Document) -> Iterator[Problem]:
    """A warning for each key inside DeepSpeed's sections that it leaves unread, and that is nearly one of its own."""
    for problem in _by_schema(document):
        if problem.severity == "warning" and problem.message.startswith("unknown key; did you mean"):
            yield problem


def _by_schema(document: Document) -> Iterator[Problem]:
    errors = contract.deepspeed_validator().iter_errors(document.data)
    for error in sorted(errors, key=lambda error: list(map(str, error.absolute_path))):
        severity = "warning" if _is_tolerated(error) else "error"
        for path, message in messages_of(error, ()):
            yield document.problem(path, message, severity)


def deprecated_keys(document: Document) -> Iterator[Problem]:
    """A warning for each of DeepSpeed's deprecated keys that is in use, naming what replaces it."""
    for path, message in _deprecated(document.data, contract.schema("deepspeed")):
        yield document.problem(path, message, "warning")


def _is_tolerated(error: Any) -> bool:
    """DeepSpeed goes on: an unknown key of an open section, or a value that its models convert."""
    if error.validator == "additionalProperties":
        return bool(error.schema.get("x-tolerant"))
    if error.validator in ("type", "pattern"):
        path = list(error.absolute_path)
        if len(path) == 1 and path[0] in COMPUTED_WITH and isinstance(error.instance, str):
            return False
        return _converts(error.instance, error.schema.get("type", ()))
    return False


def _converts(value: Any, types: Any) -> bool:
    """Values that pydantic takes for a boolean or a number although they are written otherwise."""
    if "boolean" in types:
        return value in (0, 1) or (
            isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off")
        )
    if "integer" in types or "number" in types:
        if isinstance(value, str):
            return value.strip().lstrip("+-").replace("_", "").isdigit()
        return isinstance(value, bool)
    return False


def _deprecated(value: Any, schema: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Deprecated keys that are in use, with what replaces them."""
    if not isinstance(value, dict):
        return
    for key, entry in schema.get("properties", {}).items():
        if key in value:
            if entry.get("deprecated"):
                replacement = entry.get("x-replacement")
                yield (*path, key), "deprecated in DeepSpeed" + (f"; use {replacement} instead" if replacement else "")
            yield from _deprecated(value[key], entry, (*path, key))


def _dropped(data: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Values that DeepSpeed drops without a word, with another effect than was meant."""
    zero = data.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage") == "auto":
        message = (
            "'auto' is dropped by DeepSpeed, which then runs stage 0; write 0, 1, 2 or 3, unless Accelerate fills it"
        )
        yield ("zero_optimization", "stage"), message


def _contradictions(data: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """What DeepSpeed asserts across keys, in the cases that a file alone decides."""
    on = [name for name in ("fp16", "bf16") if isinstance(data.get(name), dict) and data[name].get("enabled") is True]
    if len(on) == 2:
        yield ("fp16", "enabled"), "fp16 and bf16 are both enabled; DeepSpeed takes one of them"
    if "train_batch_size" not in data and "train_micro_batch_size_per_gpu" not in data:
        yield (
            ("train_batch_size",),
            "neither train_batch_size nor train_micro_batch_size_per_gpu is set; DeepSpeed needs one of them",
        )
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    numbers: list[Any] = [data.get(name) for name in names]
    if all(isinstance(number, int) and number > 0 for number in numbers):
        micro, steps, total = numbers
        if total % (micro * steps):
            message = f"{total} is not a multiple of {micro} x {steps} ({names[0]} x {names[1]})"
            yield ("train_batch_size",), message
