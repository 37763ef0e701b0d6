"""`ds_fp8 report RUN [RUN ...] -o report.html`: what telemetry wrote, as one page that needs no network.

A RUN is a folder with the logs of all ranks (`telemetry_rank0.jsonl` ...), which are drawn over one another, or one
log. Two or more runs stand side by side; one without telemetry (bf16) gives its loss, from trainer_state.json,
DeepSpeed's CSV monitor, metrics.json of the example, or JSONL with step and loss. The page has the alarms, the plans,
loss and bytes on the wire, and amax, scale and the share flushed to zero of every layer and operand. Needs plotly, the
extra `report`. Exit code 0: written; 1: nothing to draw yet; 2: a file cannot be read or written, or plotly is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from .page import page
from .runs import NoRunError, read_runs


def main(argv: Sequence[str]) -> int:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="ds_fp8 report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder named by telemetry/path, or one of its JSONL files"
    )
    parser.add_argument("-o", "--output", default="report.html", help="default: report.html")
    options = parser.parse_args(argv)
    if util.find_spec("plotly") is None:
        return _refuse("draws with plotly, which is not installed: pip install 'ds-fp8[report]'", 2)
    try:
        runs = read_runs(options.runs)
    except NoRunError as error:
        return _refuse(str(error), error.code)
    try:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(page(runs), encoding="utf-8")
    except OSError as error:
        return _refuse(f"{options.output} cannot be written: {error.strerror}", 2)
    histories = [history for run in runs for history in run.ranks.values()]
    steps = max(len(history.steps) for history in histories)
    alarms = sum(len(history.alarms) for history in histories)
    print(f"{options.output}: {len(runs)} run(s), {len(histories)} log(s), {steps} step(s), {alarms} alarm(s)")
    for run in runs:
        if run.odd_lines:
            print(f"{run.source}: {run.odd_lines} line(s) are no events of telemetry and were left out")
    return 0


def _refuse(reason: str, code: int) -> int:
    print(f"ds_fp8 report: {reason}", file=sys.stderr)
    return code
