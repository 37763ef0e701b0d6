"""All CPU benchmarks in one go, in under 15 minutes on two cores, and one table of goals at the end.

    make bench        or        python benchmarks/run.py [--only codec wire] [--out runs/bench]

Each benchmark is a process of its own with a time limit; its JSON lines are kept, its reports lie under `results/`. One
that fails or runs out of time is a row of the table, not a reason to stop. Sizes are cut where the full ones take
longer; the sizes are in the reports, and every file runs alone at full size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SUITE: dict[str, tuple[list[str], int]] = {
    "check": (["bench_check.py"], 60),
    "startup": (["bench_startup.py"], 120),
    "codec": (["bench_codec.py", "--numel", "100000000"], 120),
    "linear": (["bench_linear.py", "--repeats", "5"], 120),
    "optimizer": (["bench_optimizer.py", "--numel", "200000000", "--repeats", "5", "--peers"], 240),
    "states": (["bench_states.py"], 60),
    "fidelity": (["bench_fidelity.py", "--numel", "16384"], 180),
    "wire": (["bench_wire.py", "--small"], 180),
}
"""Name: the command, and the seconds after which it is stopped."""


def run(name: str, out: Path) -> dict[str, Any]:
    """Run one benchmark, keep what it prints; returns its goals and how it ended."""
    command, limit_s = SUITE[name]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    begun = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        try:
            script = [sys.executable, str(HERE / command[0]), *command[1:]]
            code = subprocess.run(
                script, check=False, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    took_s = time.monotonic() - begun
    rows = [row for line in log.read_text().splitlines() if (row := parsed(line))]
    ended = "done" if code == 0 else f"stopped after {limit_s} s" if code is None else f"exit code {code}, see {log}"
    return {"name": name, "ended": ended, "took_s": took_s, "goals": [row for row in rows if "goal" in row]}


def parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUITE), default=list(SUITE))
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "bench")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console, table = (
        Console(width=None if sys.stdout.isatty() else 150),
        Table("benchmark", "goal", "threads", "wanted", "result", ""),
    )
    failed = 0
    for name in options.only:
        found = run(name, options.out)
        console.print(f"{name}: {found['ended']}, {found['took_s']:.0f} s")
        failed += found["ended"] != "done"
        for row in found["goals"]:
            what, unit = str(row.get("goal_of", row.get("case", ""))), row.get("unit", "")
            verdict = "met" if row.get("met") else f"missed: {row.get('reason', '')}".rstrip(": ")
            table.add_row(
                name, what, str(row.get("threads", "")), f"{row['goal']} {unit}", f"{row.get('result')} {unit}", verdict
            )
        if found["ended"] != "done":
            table.add_row(name, "-", "", "", "", found["ended"])
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
