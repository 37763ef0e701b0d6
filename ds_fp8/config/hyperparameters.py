"""`optimizer/params` and `scheduler/params`: what DeepSpeed passes to a constructor unchecked.

A misspelt name there ends the job in a TypeError after all ranks have started; a number in quotes may train on as text.
`schemas/optimizers.json`, generated from DeepSpeed and torch, knows the constructors' parameters. Types of packages
outside these two (`muadam` ...) are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..releases import numbers
from . import contract
from .other_words import SCHEDULES
from .positions import Path
from .suggest import did_you_mean
from .values import show, shown_with_kind

Found = Iterator[tuple[Path, str]]

NAMES = {
    "optimizer": ("optimizers", "DeepSpeed and torch.optim"),
    "scheduler": ("schedulers", "DeepSpeed and torch.optim.lr_scheduler"),
}
WANTED = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "text",
    "numbers": "a list of numbers",
    "rates": "a number, or a list with one for each parameter group",
}
OWN_SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
NOT_NEGATIVE = ("lr", "eps", "weight_decay")

REMOVED_OPTIMIZERS = dict.fromkeys(("onebitadam", "zerooneadam", "onebitlamb"), "0.19.7")
"""Names that DeepSpeed knew until the release before this one."""

RENAMED = {
    "learning_rate": "lr",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "epsilon": "eps",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "warmup_steps": "warmup_num_steps",
    "num_warmup_steps": "warmup_num_steps",
    "total_steps": "total_num_steps",
    "num_training_steps": "total_num_steps",
    "max_lr": "warmup_max_lr",
    "min_lr": "warmup_min_lr",
}
"""What other libraries call a parameter; used where the constructor has the second name and not the first."""


def judge_hyperparameters(data: dict[str, Any]) -> Found:
    """(path, message) for each wrong type, name or value below `optimizer` and `scheduler`."""
    for part in NAMES:
        section = data.get(part)
        if isinstance(section, dict) and isinstance(section.get("type"), str):
            yield from _judge(part, section["type"], section.get("params"))


def _judge(part: str, name: str, params: Any) -> Found:
    table, where = NAMES[part]
    known: dict[str, Any] = contract.schema_file("optimizers")[table]
    # DeepSpeed's own optimizers may be written in any case; torch's, and schedules, are looked up as they stand.
    found = name.lower() if part == "optimizer" and name.lower() in known else name
    if part == "optimizer" and found not in known and (removed := REMOVED_OPTIMIZERS.get(found.lower())):
        if not _is_installed_before(removed):
            cure = "use AdamW (msamp sends its gradients in FP8), or an older DeepSpeed"
            yield (part, "type"), f"{show(name)} was removed in DeepSpeed {removed}; {cure}"
        return
    if found not in known:
        proper = [known_name for known_name in known if not known_name.islower()] or list(known)
        meant = SCHEDULES.get(name.lower()) if part == "scheduler" else None
        hint = f"; DeepSpeed calls it {meant}" if meant else ""
        hint = hint or did_you_mean(name, [*proper, *(known_name for known_name in known if known_name.islower())])
        if not hint and part == "scheduler":
            hint = f"; DeepSpeed's own are {', '.join(OWN_SCHEDULERS)}"
        yield (part, "type"), f"{show(name)} is no {part} of {where}{hint}"
        return
    if known[found] is None or params in (None, "auto"):
        if known[found] is not None:
            yield from _missing(part, found, {})
        return
    if not isinstance(params, dict):
        return  # the schema says so
    for key, value in params.items():
        message = _removed(part, key)
        if message is None and key not in known[found]:
            message = _unknown(name, key, known[found])
        message = message or _value(key, value, known[found].get(key, "any"))
        if message:
            yield (part, "params", key), message
    yield from _missing(part, found, params)


def _is_installed_before(release: str) -> bool:
    """Whether the DeepSpeed of this environment is older; False where there is none."""
    from importlib import metadata  # slow to import, and rarely asked

    try:
        return numbers(metadata.version("deepspeed")) < numbers(release)
    except metadata.PackageNotFoundError:
        return False


def _missing(part: str, name: str, params: dict[str, Any]) -> Found:
    for key in contract.schema_file("optimizers")["required"].get(name, ()):
        if key not in params:
            yield (part, "params"), f"'{key}' is missing, and {name} has no default for it"


def _removed(part: str, key: str) -> str | None:
    if part == "optimizer" and key == "max_grad_norm":
        return "DeepSpeed refuses it here; write gradient_clipping at the top level"
    return None


def _unknown(name: str, key: str, known: dict[str, str]) -> str:
    meant = RENAMED.get(key)
    hint = f"; did you mean '{meant}'?" if meant in known else did_you_mean(key, known)
    return f"unknown parameter of {name}{hint or '; known are ' + ', '.join(known)}"


def _value(key: str, value: Any, kind: str) -> str | None:
    if value == "auto" or (value is None and kind.endswith("?")):
        return None
    kind = kind.rstrip("?")
    if kind == "any":
        return None
    if kind == "code":
        return "takes Python code, which JSON cannot hold; make this schedule in the script and pass it to initialize()"
    if not _is(value, kind):
        return f"{shown_with_kind(value)}, expected {WANTED[kind]}{_cure(key, value, kind)}"
    if key in NOT_NEGATIVE and isinstance(value, (int, float)) and value < 0:
        return f"{show(value)} is negative"
    if key == "betas" and (len(value) < 2 or not all(0 <= beta < 1 for beta in value)):
        return f"{show(value)}: two numbers from 0 to below 1, as [0.9, 0.999]"
    if key == "warmup_num_steps" and value <= 0:
        return f"{show(value)}: DeepSpeed wants at least one step"
    return None


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    numbers = isinstance(value, (list, tuple)) and all(
        isinstance(item, (int, float)) and not isinstance(item, bool) for item in value
    )
    if kind == "integer":
        return number and float(value).is_integer()
    checks = {"number": number, "numbers": numbers, "rates": number or numbers}
    return checks[kind] if kind in checks else isinstance(value, bool if kind == "boolean" else str)


def _cure(key: str, value: Any, kind: str) -> str:
    if isinstance(value, str) and kind in ("number", "integer", "rates"):
        try:
            float(value)
        except ValueError:
            return ""
        return f"; write {value} without quotes"
    if isinstance(value, str) and kind == "boolean" and value.lower() in ("true", "false"):
        return f"; write {value.lower()} without quotes"
    if key == "betas" and isinstance(value, (int, float)):
        return f"; write [{show(value)}, 0.999]"
    if isinstance(value, str) and kind == "numbers":
        return f"; write {value} without quotes" if value.startswith("[") else ""
    return ""
