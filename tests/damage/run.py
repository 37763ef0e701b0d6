"""Fill the damage table:   python tests/damage/run.py [--write FILE] [--keep FILE] [--every N [--seed N]] [TRIAL ...]

Every entry of a checkpoint, ours and DeepSpeed's beside it, in every wrong way (`damages.py`), loaded by one rank and
by two, with and without the manifest; what comes of each (`trial.py`). A trial is two forks with a time limit: one that
hangs or dies is counted as that, and the next damage begins with a new engine.

--keep    results of several calls come together in this file, trials that stand there are not repeated
--every   takes every Nth damage; with --seed as many, drawn at random
--only    takes those whose name, `entry: how`, this expression finds
TRIAL     words of names, as "O2, stage 2, 2 ranks"
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / one) for one in ("damage", "checkpoint", "comm"))]

import deepspeed  # noqa: E402, F401
from page import bad, page  # noqa: E402
from trial import LEVELS, Trial, lines_of, run  # noqa: E402

SILENT_S = 60.0
"""A trial that has reported nothing for so long hangs."""

TRIALS = [
    Trial(level, stage, world_size, manifest)
    for manifest in (False, True)
    for world_size in (1, 2)
    for stage in (0, 2, 3)
    for level in LEVELS
    if not (level == "O3" and stage == 0)
]


def _rank(rank: int, trial: Trial, place: Path, first: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(trial.world_size))
    os.environ["LOCAL_WORLD_SIZE"] = str(trial.world_size)
    from ranks import init_comm

    init_comm(rank, trial.world_size, str(place / "meet"), "gloo")
    with (place / "report").open("a") as file:

        def report(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        run(rank, trial, place, first, report)


def _start(trial: Trial, place: Path, first: int) -> None:
    """Both ranks from damage `first` on, until they end, or hang."""
    children = []
    for rank in range(trial.world_size):
        child = os.fork()
        if child == 0:
            log = os.open(str(place / f"log{rank}"), os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1), os.dup2(log, 2)
            signal.alarm(3600)  # ends it where the parent was ended first
            try:
                _rank(rank, trial, place, first)
            except BaseException:  # noqa: BLE001  told by the parent
                traceback.print_exc()
            os._exit(0)
        children.append(child)
    size, changed = -1, time.monotonic()
    while children:
        children = [child for child in children if not os.waitpid(child, os.WNOHANG)[0]]
        now = (place / "report").stat().st_size if (place / "report").exists() else 0
        if now != size:
            size, changed = now, time.monotonic()
        if time.monotonic() - changed > SILENT_S:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return
        time.sleep(0.05)


def perform(trial: Trial) -> list[dict[str, Any]]:
    """What came of each damage: {file, damage, kind, outcome, said}."""
    found: dict[int, dict[str, Any]] = {}
    while True:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            place = Path(folder)
            _start(trial, place, max(found, default=-1) + 1)
            report = (place / "report").read_text() if (place / "report").exists() else ""
            begun = None
            for line in lines_of(report):
                if "begins" in line:
                    begun = line.pop("begins")
                    found[begun] = {**line, "outcome": "hang", "said": "not done in time, or died"}
                elif "ends" in line:
                    found[line["ends"]].update(outcome=line["outcome"], said=line["said"])
                elif "done" in line:
                    return [found[number] for number in sorted(found)]
            if begun is None:
                logs = [file.read_text(errors="replace")[-3000:] for file in sorted(place.glob("log*"))]
                if any("Traceback" in log for log in logs):
                    raise RuntimeError(f"{trial.name}: no damage was tried\n" + "\n".join(logs))
                return [found[number] for number in sorted(found)]  # the last one ended the ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true", help="the names of the trials")
    parser.add_argument("trials", nargs="*")
    options = parser.parse_args()
    chosen = [one for one in TRIALS if not options.trials or any(word in one.name for word in options.trials)]
    if options.list:
        print("\n".join(one.name for one in chosen))
        return 0
    from ds_fp8 import kernels

    kernels.path("cpu")  # compiled here, not by every rank
    table = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    for trial in chosen:
        if trial.name in table:
            continue
        began = time.monotonic()
        sample = {"every": options.every, "seed": options.seed}
        found = perform(replace(trial, **sample, only=options.only))
        table[trial.name] = {**sample, "found": found}
        counts: dict[str, int] = {}
        for one in found:
            counts[one["outcome"]] = counts.get(one["outcome"], 0) + 1
        print(f"{trial.name} ({time.monotonic() - began:.0f} s): {counts}", flush=True)
        if options.keep:
            options.keep.write_text(json.dumps(table))
    if options.write:
        options.write.write_text(page(table, str(options.write)))
    damages = sum(len(trial["found"]) for trial in table.values())
    print(json.dumps({"damages": damages, "bad": bad(table)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
