"""Whether a universal checkpoint (`ds_to_universal`) is whole: found without torch and without running a pickle.

    TAG/zero/PARAMETER/fp32.pt, exp_avg.pt, ...     one folder for each parameter, one file for each of its states
    TAG/zero/optimizer_state.pt
    TAG/mp_rank_00_model_states.pt                  counters, schedulers, names and shapes of the parameters

The conversion has no mark of its end: one that was broken off leaves folders out, or files in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .complete import MODEL_FILE, MOST_STEPS, Found, is_count, read_inert

CONVERT = (
    "  Convert it with `python -m deepspeed.checkpoint.ds_to_universal --input_folder DIR/TAG --output_folder "
    "DIR/TAG_universal`"
    ' and load that with "checkpoint": {"load_universal": true}.'
)
"""The cure for a checkpoint of another stage or world size: the last lines of an error."""


def is_universal(tag: Path) -> bool:
    """The folder is the result of a conversion."""
    return (tag / "zero").is_dir()


def look_universal(tag: Path) -> Found:
    """Judge one; its files' content is left to `records.check_records`."""
    faults: list[str] = []
    models = [
        model
        for file in sorted(tag.glob("*_model_states.pt"))
        if MODEL_FILE.match(file.name) and isinstance(model := read_inert(file, faults), dict)
    ]
    if not models:
        faults.append("no model file of DeepSpeed")
    if not (tag / "zero" / "optimizer_state.pt").is_file():
        faults.append("zero/optimizer_state.pt is missing")
    states = {
        folder.name: frozenset(file.name for file in folder.glob("*.pt") if file.stat().st_size)
        for folder in sorted((tag / "zero").iterdir())
        if folder.is_dir()
    }
    faults += _lacking(states)
    faults += [f"zero/{name} is missing" for model in models for name in _names(model) if name not in states]
    step = next((model["global_steps"] for model in models if is_count(model.get("global_steps"), MOST_STEPS)), -1)
    return Found(tag.name, step, tuple(dict.fromkeys(faults)))


def _lacking(states: dict[str, frozenset[str]]) -> Iterator[str]:
    """A parameter whose files are some of those that another one has, and not all: they come from one optimizer."""
    for name, files in states.items():
        fuller = next((other for other in states.values() if files < other), frozenset({"fp32.pt"}))
        for file in sorted(fuller - files):
            yield f"zero/{name}/{file} is missing or empty"


def _names(model: dict[str, Any]) -> Iterator[str]:
    """Names of the trained parameters that the model file lists, group by group."""
    groups = model.get("param_shapes")
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, dict):
            yield from (name for name in group if isinstance(name, str))
