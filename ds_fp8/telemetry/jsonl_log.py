"""The JSONL log of telemetry: one JSON object on each line, appended and flushed, so that a killed job leaves a readable file.

Every line has `event` (`plan`, `step`, `alarm`) and `time` (seconds since the epoch). The first line of a run is its
plan; a resumed run writes another one behind the old lines.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class JsonlLog:
    """A JSONL file. Only one process writes it; who that is, is not decided here."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_jsonl_log(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines; a last line that was cut off by a kill is left out."""
    events = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events
