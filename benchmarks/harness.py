"""How every CPU benchmark here measures and reports, so that their numbers can be compared.

- Correctness first: a benchmark asserts that the contestants compute the same thing before it times them.
- Warm-up, then alternated repeats: one run of each contestant in turn, so that a slow second of the machine hits all.
- The median, and as spread the interquartile range over the median; a spread above 15 % is marked, not hidden.
- One line of JSON per result on stdout; a Markdown report under `results/`, named after what, hardware and month,
  with versions, command and date. A row that missed its goal stays, with its reason.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
NOISY = 0.15


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant: median, and the distance between the quartiles relative to it."""

    median_s: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        median = statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
        return cls(median, (quartiles[2] - quartiles[0]) / abs(median), len(seconds))

    def per(self, items: int) -> float:
        """Nanoseconds per item."""
        return self.median_s / items * 1e9


def alternate(contestants: Mapping[str, Callable[[], Any]], *, repeats: int = 7, warmup: int = 2) -> dict[str, Timing]:
    """Time the contestants in turn; `repeats` runs of each after `warmup` untimed ones."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in range(warmup + repeats):
        for name, function in contestants.items():
            begun = time.perf_counter()
            function()
            elapsed = time.perf_counter() - begun
            if run >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing.of(taken) for name, taken in seconds.items()}


def cpu_name() -> str:
    """The processor's marketing name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware_slug() -> str:
    """`amd-epyc-2c`: for file names."""
    return re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-") + f"-{os.cpu_count()}c"


def versions() -> dict[str, str]:
    """Versions of what was measured, for those that are installed."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "torchao", "bitsandbytes"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def goal_row(
    bench: str,
    what: str,
    result: float | None,
    goal: float,
    *,
    unit: str = "x",
    reason: str = "",
    peer: str = "",
    at_most: bool = False,
) -> dict[str, Any]:
    """What was wanted and what came out, as one JSON line and one row of the table.

    result   None when it could not be measured; `reason` then says why, and the row stays
    reason   printed when the goal was missed
    peer     who was beside us, with its own figure: "torch AdamW(fused) 0.58 ns"
    at_most  the goal is an upper bound
    """
    met = result is not None and (result <= goal if at_most else result >= goal)
    row = {"bench": bench, "goal_of": what, "goal": goal, "unit": unit, "at_most": at_most, "met": met, "peer": peer}
    row["result"] = None if result is None else round(result, 4)
    row["threads"] = torch.get_num_threads()
    if not met:
        assert result is not None or reason, f"{what}: what was not measured has a reason"
        row["reason"] = reason
    return row


def goal_cells(row: Mapping[str, Any]) -> list[str]:
    """What, threads, wanted, result, peer and verdict of a goal, as both tables show them."""
    wanted = f"{'<=' if row['at_most'] else '>='} {row['goal']:g} {row['unit']}"
    result = "-" if row["result"] is None else f"{row['result']:.3g} {row['unit']}"
    missed = "not measured" if row["result"] is None else "missed"
    verdict = "met" if row["met"] else f"{missed}: {row.get('reason', '')}".rstrip(": ")
    return [row["goal_of"], str(row["threads"]), wanted, result, row["peer"] or "-", verdict]


def goal_table(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    """The goals in Markdown."""
    rows = [f"| {' | '.join(cell.replace('|', '/') for cell in goal_cells(row))} |" for row in goals]
    return ["| goal | threads | wanted | result | peer | |", "|---|---|---|---|---|---|", *rows]


class Report:
    """Rows of one benchmark, and the goals among them; printed as JSON lines, written as Markdown at the end."""

    def __init__(self, what: str, question: str):
        self.what = what
        self.question = question
        self.rows: list[dict[str, Any]] = []
        self.goals: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def timing(self, contestant: str, case: str, timing: Timing, *, value: float, unit: str) -> None:
        """One measured contestant; `value` is what the reader compares (ns per element, ms)."""
        row = {"bench": self.what, "case": case, "contestant": contestant, "value": round(value, 4), "unit": unit}
        row |= {"spread": round(timing.spread, 3), "repeats": timing.repeats, "threads": torch.get_num_threads()}
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def goal(
        self,
        what: str,
        *,
        result: float | None,
        goal: float,
        unit: str = "x",
        reason: str = "",
        peer: str = "",
        at_most: bool = False,
    ) -> None:
        """One line of the table; see `goal_row`."""
        row = goal_row(self.what, what, result, goal, unit=unit, reason=reason, peer=peer, at_most=at_most)
        self.goals.append(row)
        print(json.dumps(row), flush=True)

    def note(self, text: str) -> None:
        """A fact that the reader of the numbers needs: a peer that is not installed, a size that was cut."""
        self.notes.append(text)
        print(json.dumps({"bench": self.what, "note": text}), flush=True)

    def write(self, directory: Path = RESULTS) -> Path:
        """The Markdown report; returns its path."""
        now = datetime.datetime.now(datetime.timezone.utc)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"{self.what}_{hardware_slug()}_{now:%Y%m}.md"
        file.write_text("\n".join(self._lines(now)) + "\n", encoding="utf-8")
        print(f"written: {file.relative_to(directory.parent.parent)}", flush=True)
        return file

    def _lines(self, now: datetime.datetime) -> list[str]:
        from ds_fp8.kernels import cpu

        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        software = ", ".join(f"{name} {version}" for name, version in versions().items())
        lines = [
            f"# {self.question}",
            "",
            f"{now:%Y-%m-%d}, {cpu_name()}, {os.cpu_count()} cores, kernels: {cpu.path()}",
        ]
        lines += [f"{software}  ", f"`{command}`", ""]
        if self.goals:
            lines += goal_table(self.goals)
            lines.append("")
        lines += ["| case | contestant | threads | median | spread |", "|---|---|---|---|---|"]
        for row in self.rows:
            spread = f"{row['spread']:.0%}" + (" (noisy)" if row["spread"] > NOISY else "")
            value = f"{row['value']:.3f} {row['unit']}"
            lines.append(f"| {row['case']} | {row['contestant']} | {row['threads']} | {value} | {spread} |")
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return lines
