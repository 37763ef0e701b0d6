"""The page of `ds_fp8 report`: the numbers as JSON, and the three files that show them (`report.html`, `.css`, `.js`).

Everything stands in the one file, plotly's script too, so that it opens on a cluster without a network. A long run is
thinned to what a screen can show: a point then stands for several steps and is their largest amax and underflow, their
smallest scale, their mean loss and bytes; the page says how many.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..telemetry.tensor_statistics import ROLES
from .history import QUANTITIES, History, SeenAlarm, Series
from .runs import Run

MOST_POINTS, LEAST_POINTS = 400, 40
MOST_NUMBERS = 1_500_000
"""Points of one line, and numbers of a page (about 8 bytes each) before lines get fewer points."""

ORDER = ("nonfinite", "saturated", "underflow", "idle")
"""Alarms, the worst kind first."""

THINNED: dict[str, Callable[[list[float]], float]] = {"amax": max, "scale": min, "underflow": max}

PARTS = Path(__file__).parent


def page(runs: list[Run]) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    data = json.dumps({"runs": [run_data(run, _points(runs)) for run in runs], "roles": ROLES}, allow_nan=False)
    title = " and ".join(run.name for run in runs[:3])
    parts = {
        "title": html.escape(title),
        "style": (PARTS / "report.css").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "data": data.replace("<", "\\u003c"),
        "script": (PARTS / "report.js").read_text(encoding="utf-8"),
    }
    text = (PARTS / "report.html").read_text(encoding="utf-8")
    # In one pass: a layer or a folder that is named as a mark is not replaced in its turn.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], text)


def run_data(run: Run, points: int = MOST_POINTS) -> dict[str, Any]:
    """What the page draws of one run; what was not measured is absent, never zero."""
    histories = run.ranks
    layers = list(dict.fromkeys(layer for history in histories.values() for layer in history.layers()))
    every = max(1, math.ceil(max(len(history.steps) for history in histories.values()) / points))
    lines = [
        [role, quantity, layers.index(layer), rank, *_thin(series, every, THINNED[quantity])]
        for rank, history in histories.items()
        for role in ROLES
        for quantity in QUANTITIES
        for layer, series in history.statistics(role, quantity).items()
    ]
    whole = {
        name: {rank: _thin(read(history), every, mean) for rank, history in histories.items() if read(history)[0]}
        for name, read in (
            ("loss", lambda history: history.values("loss")),
            ("sent", History.sent_bytes),
            ("deepspeed", History.bytes_of_deepspeed),
        )
    }
    return {
        "name": run.name,
        "source": run.source,
        "banner": run.banner,
        "ranks": sorted(histories),
        "layers": layers,
        "every": every,
        "lines": lines,
        **whole,
        "alarms": alarm_groups(run),
        "facts": facts(run),
    }


def facts(run: Run) -> list[tuple[str, str | None]]:
    """(what, value) for the table in which runs stand side by side; None is shown as "not measured"."""
    histories = list(run.ranks.values())
    steps = [step["step"] for history in histories for step in history.steps]
    starts = max(history.runs for history in histories)
    losses = [loss for history in histories if (loss := _last(history.values("loss"))) is not None]
    sent, theirs = (
        [value for history in histories for value in read(history)[1]]
        for read in (History.sent_bytes, History.bytes_of_deepspeed)
    )
    flushed = {role: _flushed(histories, role) for role in ROLES}
    return [
        ("ranks", str(len(histories))),
        ("steps looked at", f"{len(set(steps))}, from {min(steps)} to {max(steps)}"),
        ("started", None if not starts else "once" if starts == 1 else f"{starts} times"),
        ("loss, mean of the last tenth", f"{mean(losses):.4f}" if losses else None),
        ("sent for each step, by a rank", _megabytes(mean(sent)) if sent else None),
        ("of DeepSpeed's own bytes", f"{mean(sent) / mean(theirs):.0%}" if sent and theirs else None),
        *((f"flushed to zero, {role}, median", flushed[role]) for role in ROLES),
        ("alarms", str(sum(len(history.alarms) for history in histories)) if run.banner else None),
    ]


def _last(series: Series) -> float | None:
    values = series[1]
    return mean(values[-max(1, len(values) // 10) :]) if values else None


def _flushed(histories: list[History], role: str) -> str | None:
    shares = [
        value
        for history in histories
        for series in history.statistics(role, "underflow").values()
        for value in series[1]
    ]
    return f"{median(shares):.2%}" if shares else None


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB"


def alarm_groups(run: Run) -> list[dict[str, Any]]:
    """Alarms of one kind with one cure together, the worst kind first; in it one row for each operand."""
    groups: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for rank, history in run.ranks.items():
        for alarm in history.alarms:
            rows = groups.setdefault((alarm.kind, alarm.cure), {})
            row = rows.setdefault(
                (alarm.fqn, alarm.role),
                {"fqn": alarm.fqn, "role": alarm.role, "finding": _finding(alarm), "steps": [], "ranks": []},
            )
            row["steps"] = sorted({*row["steps"], alarm.step})
            row["ranks"] = sorted({*row["ranks"], rank})

    def order(kind: str) -> int:
        return ORDER.index(kind) if kind in ORDER else len(ORDER)

    found = [{"kind": kind, "cure": cure, "rows": list(rows.values())} for (kind, cure), rows in groups.items()]
    return sorted(found, key=lambda group: (order(str(group["kind"])), -len(group["rows"])))


def _finding(alarm: SeenAlarm) -> str:
    """The sentence without what stands beside it in the table."""
    return alarm.text.removeprefix(f"{alarm.fqn}: {alarm.role} ").removesuffix(f"; {alarm.cure}")


def _points(runs: list[Run]) -> int:
    """Points of a line, so that the page stays small enough to open."""
    lines = sum(len(history.layers()) for run in runs for history in run.ranks.values()) * len(ROLES) * len(QUANTITIES)
    return max(LEAST_POINTS, min(MOST_POINTS, MOST_NUMBERS // max(lines, 1)))


def _thin(series: Series, every: int, together: Callable[[list[float]], float]) -> Series:
    """Each `every` points as one, at the last of their steps; five digits."""
    steps, values = series
    starts = range(0, len(steps), every)
    return (
        [steps[min(start + every, len(steps)) - 1] for start in starts],
        [float(f"{together(values[start : start + every]):.5g}") for start in starts],
    )
