"""One measurement's results: saved as they come, so that a measurement that is cut off keeps what it has measured.

A measurement is a script of its own process, because one illegal memory access on a GPU ends CUDA for the whole
process. It gets a folder and a number of seconds, and calls `record` for each finding. The runner merges the
measurements into one `results.json` and one `results.md`.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Ledger:
    """The findings of one measurement, written to `<out>/<measurement>.json` after every entry.

    seconds   wall-clock budget; `left()` is what remains, and `attempt` skips with a note when it is spent
    """

    def __init__(self, measurement: str, out: Path, seconds: float):
        self.measurement, self.out, self.seconds = measurement, out, seconds
        self.start = time.monotonic()
        self.entries: dict[str, Any] = {}
        self.problems: dict[str, str] = {}
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.seconds - (time.monotonic() - self.start)

    def record(self, name: str, value: Any) -> None:
        """Keep one finding (built-in types) and print it."""
        self.entries[name] = value
        print(f"[{self.measurement}] {name}: {value}", flush=True)
        self.write("running")

    def problem(self, name: str, text: str) -> None:
        """Keep one thing that could not be measured, with the reason."""
        self.problems[name] = text
        print(f"[{self.measurement}] NOT MEASURED {name}: {text}", flush=True)
        self.write("running")

    def attempt(self, name: str, measure: Callable[[], Any], *, needs_s: float = 0.0) -> Any:
        """Record `measure()` under `name`; an exception becomes a problem, and so does too little time."""
        if self.left() < needs_s:
            return self.problem(name, f"needs {needs_s:.0f} s, {self.left():.0f} s of the budget are left")
        try:
            value = measure()
        except Exception as error:  # noqa: BLE001 - a benchmark goes on with the next question
            text = f"{type(error).__name__}: {str(error)[:500]}"
            traceback.print_exc(limit=4)
            return self.problem(name, text)
        self.record(name, value)
        return value

    def write(self, state: str) -> None:
        data = {"piece": self.measurement, "state": state, "seconds": round(time.monotonic() - self.start, 1)}
        data |= {"entries": self.entries, "problems": self.problems}
        path = self.out / f"{self.measurement}.json"
        path.with_suffix(".tmp").write_text(json.dumps(data, indent=1, default=str))
        path.with_suffix(".tmp").replace(path)


def main(measurement: str, body: Callable[[Ledger], None], *, needs_cuda: bool = True) -> None:
    """The `__main__` of every measurement: parse `--out` and `--seconds`, run `body`, close the ledger."""
    parser = argparse.ArgumentParser(description=f"one measurement of the GPU measurements: {measurement}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--seconds", type=float, default=540)
    options = parser.parse_args()
    ledger = Ledger(measurement, options.out, options.seconds)
    import torch

    if needs_cuda and not torch.cuda.is_available():
        ledger.problem("device", "no CUDA device here: nothing of this measurement can be measured")
        ledger.write("skipped")
        return
    body(ledger)
    ledger.write("done")
