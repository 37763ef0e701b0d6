"""The JSONL log of telemetry: one JSON object on each line, appended and flushed, so that a killed job leaves a
readable file.

Every line has `event` (`plan`, `step`, `alarm`) and `time` (seconds since the epoch). The first line of a run is its
plan; a resumed run writes another one behind the old lines.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class JsonlLog:
    """A JSONL file. Only one process writes it; who that is, is not decided here.

    Watching must not end what it watches: a folder that cannot be made, a full disk, a quota is reported once on
    stderr, then nothing more is written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_open = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._end_cut_line()
        except OSError as error:
            self._give_up(error)

    def write(self, event: str, **values: Any) -> None:
        if not self.is_open:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._give_up(error)

    def _end_cut_line(self) -> None:
        """A job that was killed in a write leaves half a line; the next one must not be glued to it."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return
        with self.path.open("r+b") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def _give_up(self, error: OSError) -> None:
        self.is_open = False
        print(
            f"ds_fp8: telemetry: {self.path}: {error.strerror}; nothing more is written, training goes on",
            file=sys.stderr,
        )


def read_jsonl_log(path: str | Path) -> list[dict[str, Any]]:
    """All lines that are whole; one that was cut off by a kill or a full disk loses only itself."""
    events = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
