"""All CPU benchmarks at once, in under 15 minutes on two cores, and one table of goals at the end.

    make bench        or        python benchmarks/run.py [--only codec wire] [--out runs/bench]

Each benchmark is a process of its own with a time limit; its JSON lines are kept, its reports lie under `results/`. One
that fails or runs out of time is a row of the table, not a reason to stop. Sizes are cut where the full ones take
longer; the sizes are in the reports, and every file runs alone at full size. The table is written to
`results/bench_<hardware>_<month>.md` as well, unless only some of the benchmarks ran.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, cpu_name, goal_cells, goal_table, hardware_slug, versions
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SUITE: dict[str, tuple[list[str], int]] = {
    "check": (["bench_check.py"], 90),
    "startup": (["bench_startup.py", "--repeats", "4"], 120),
    "build": (["bench_build.py"], 120),
    "codec": (["bench_codec.py", "--numel", "100000000", "--exhaustive"], 300),
    "linear": (["bench_linear.py", "--repeats", "5"], 120),
    "optimizer": (["bench_optimizer.py", "--repeats", "3", "--peers"], 480),
    "states": (["bench_states.py"], 90),
    "fidelity": (["bench_fidelity.py", "--numel", "16384"], 240),
    "tokens": (["bench_tokens.py"], 180),
    "wire": (["bench_wire.py", "--small"], 240),
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
    return {"name": name, "ended": ended, "took_s": took_s, "goals": [row for row in rows if "goal_of" in row]}


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
    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table("benchmark", "goal", "threads", "wanted", "result", "peer", "")
    found = []
    for name in options.only:
        found.append(run(name, options.out))
        console.print(f"{name}: {found[-1]['ended']}, {found[-1]['took_s']:.0f} s")
        for row in found[-1]["goals"]:
            table.add_row(name, *goal_cells(row))
        if found[-1]["ended"] != "done":
            table.add_row(name, "-", "", "", "", "", found[-1]["ended"])
    console.print(table)
    if options.only == list(SUITE):
        console.print(f"written: {write(found)}")
    return 1 if any(each["ended"] != "done" for each in found) else 0


def write(found: list[dict[str, Any]]) -> Path:
    """All goals in one report; returns its path."""
    now = datetime.datetime.now(datetime.timezone.utc)
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    total_s = sum(each["took_s"] for each in found)
    lines = ["# The CPU benchmarks: goal, result, peer", "", f"{now:%Y-%m-%d}, {cpu_name()}, {os.cpu_count()} cores  "]
    lines += [f"{software}  ", f"`python benchmarks/run.py`, {total_s / 60:.1f} minutes in all"]
    for each in found:
        ended = "" if each["ended"] == "done" else f"; {each['ended']}"
        lines += [
            "",
            f"## {each['name']}",
            "",
            f"`{' '.join(SUITE[each['name']][0])}`, {each['took_s']:.0f} s{ended}",
            "",
        ]
        lines += goal_table(each["goals"]) if each["goals"] else ["No goals; its report is beside this one."]
    file = RESULTS / f"bench_{hardware_slug()}_{now:%Y%m}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file.relative_to(HERE.parent)


if __name__ == "__main__":
    raise SystemExit(main())
