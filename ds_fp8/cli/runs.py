"""The runs that `ds_fp8 report` is asked for: a folder with the logs of all ranks, a log, or the losses of an
unmodified job.

A job without our sections writes no telemetry. For the comparison of bf16 and FP8 its loss is read where it lies
already: `trainer_state.json` (Hugging Face), DeepSpeed's CSV monitor, `metrics.json` (our example), or JSONL with
`step` and `loss`.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..telemetry import read_jsonl_log
from .history import History, Series, number, read_history

RANK = re.compile(r"telemetry_rank(\d+)\.jsonl$")


class NoRunError(Exception):
    """Nothing to draw there. `code` is the exit code: 2 it cannot be read, 1 there is nothing in it yet."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


@dataclass
class Run:
    """One job: its name in the page, and the history of each rank that was found."""

    name: str
    source: str
    ranks: dict[int, History] = field(default_factory=dict)

    @property
    def banner(self) -> str:
        """The plan, the same on all ranks; empty for a job without telemetry."""
        return next((history.banner for history in self.ranks.values() if history.banner), "")

    @property
    def odd_lines(self) -> int:
        return sum(history.odd for history in self.ranks.values())


def read_runs(arguments: list[str]) -> list[Run]:
    """One run for each argument; logs of several ranks in one folder are one run. Raises NoRunError."""
    runs: dict[str, Run] = {}
    for argument in arguments:
        path = Path(argument)
        is_rank = not path.is_dir() and RANK.search(path.name) is not None
        key = str(path.parent) if is_rank else str(path)
        run = runs.setdefault(key, Run(key, key))
        if is_rank:
            run.source = argument if not run.ranks else key
        for rank, history in _histories(path):
            run.ranks[rank] = history
    named = list(runs.values())
    for run, name in zip(named, _short_names([run.source for run in named])):
        run.name = name
        if not any(history.steps for history in run.ranks.values()):
            raise NoRunError(
                f"{run.source} holds no step yet; telemetry/interval says how often one is written", code=1
            )
    return named


def _histories(path: Path) -> Iterator[tuple[int, History]]:
    """(rank, history) of everything that `path` names."""
    if path.is_dir():
        logs = sorted(
            (int(found.group(1)), file) for file in path.iterdir() if (found := RANK.search(file.name)) is not None
        )
        for rank, file in logs:
            yield rank, _telemetry(file)
        if not logs:
            yield 0, _losses_in(path)
        return
    found = RANK.search(path.name)
    yield int(found.group(1)) if found else 0, _log(path)


def _telemetry(path: Path) -> History:
    try:
        events = read_jsonl_log(path)
    except OSError as error:
        raise NoRunError(f"{path} cannot be read ({type(error).__name__}: {error.strerror})") from None
    history = read_history(events)
    if not history.runs and not history.steps:
        raise NoRunError(f"{path} is no telemetry log: no line of it is an event")
    return history


def _log(path: Path) -> History:
    """One file: a telemetry log, or the losses of a job without telemetry."""
    if path.name in LOSSES or path.suffix == ".csv":
        return _of_losses(_read(path, LOSSES.get(path.name, _csv)))
    try:
        return _telemetry(path)
    except NoRunError:
        series = _read(path, _jsonl)
        if not series[0]:
            raise
        return _of_losses(series)


def _losses_in(folder: Path) -> History:
    """The newest file below `folder` that holds losses."""
    names = [*LOSSES, "*train_loss*.csv"]
    files = [file for name in names for file in folder.rglob(name)]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        series = _read(file, LOSSES.get(file.name, _csv))
        if series[0]:
            return _of_losses(series)
    raise NoRunError(
        f"{folder} holds neither telemetry_rank*.jsonl nor losses of an unmodified job "
        "(trainer_state.json, the CSV monitor's train_loss, metrics.json)"
    )


def _read(path: Path, parse: Any) -> Series:
    try:
        found = [
            (int(step), value)
            for step, value in parse(path.read_text(encoding="utf-8", errors="replace"))
            if number(step) is not None and number(value) is not None
        ]
    except OSError as error:
        raise NoRunError(f"{path} cannot be read ({type(error).__name__}: {error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NoRunError(f"{path} holds no losses ({type(error).__name__}: {error})") from None
    by_step = dict(found)
    return list(by_step), list(by_step.values())


def _of_losses(series: Series) -> History:
    steps = ({"event": "step", "step": at, "loss": value, "values": {}, "readings": []} for at, value in zip(*series))
    return History(0, "", tuple(sorted(steps, key=lambda step: step["step"])))


def _trainer_state(text: str) -> Iterator[tuple[Any, Any]]:
    for entry in json.loads(text)["log_history"]:
        if "loss" in entry:
            yield entry["step"], entry["loss"]


def _metrics(text: str) -> Iterator[tuple[Any, Any]]:
    yield from json.loads(text)["curve"]["train"]


def _csv(text: str) -> Iterator[tuple[Any, Any]]:
    """DeepSpeed's CSV monitor writes (samples, loss) after each step; the least distance is the samples of one step."""
    rows = [(int(row[0]), float(row[1])) for row in csv.reader(text.splitlines()[1:]) if len(row) == 2]
    samples = [0, *sorted({at for at, _ in rows})]
    each = min((after - before for before, after in itertools.pairwise(samples) if after > before), default=1)
    for at, loss in rows:
        yield round(at / each), loss


def _jsonl(text: str) -> Iterator[tuple[Any, Any]]:
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry.get("step"), entry.get("loss")


LOSSES = {"trainer_state.json": _trainer_state, "metrics.json": _metrics}


def _short_names(paths: list[str]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [Path(path).parts or (path,) for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)
