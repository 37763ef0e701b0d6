"""Stands for a training on one rank, without torch: steps, checkpoints with a manifest, and what a test wishes to go
wrong.

STEPS, STEP_S      how many, how long                        SAVE_EVERY   steps between checkpoints (rank 0 writes)
DIE                "rank step code", or KILL for the code    HANG         "rank step": sleeps there
MARK               neither happens if this file exists; it is made first
On USR1 (SAVES_ON: others) it does what `checkpoint_on_signal` does: saves after the step, leaves with 128 + signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

wish = os.environ.get
rank, folder, mark = int(os.environ["RANK"]), Path(wish("CHECKPOINT_DIR", "ckpt")), Path(wish("MARK", "mark"))
received = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # one write: ranks may share the pipe


def save(step: int) -> None:
    if rank == 0:
        tag = folder / f"global_step{step}"
        tag.mkdir(parents=True, exist_ok=True)
        (tag / "ds_fp8_manifest.json").write_text(json.dumps({"version": 1, "step": step, "files": {}}))
        (folder / "latest").write_text(tag.name)


def together(step: int) -> None:
    """No rank ends a step before all others have begun it, as collectives would have it."""
    Path(wish("REPORTS", "."), f"at_{rank}").write_text(str(step))
    others = [Path(wish("REPORTS", "."), f"at_{other}") for other in range(int(os.environ["WORLD_SIZE"]))]
    limit = time.monotonic() + 30
    while not received and time.monotonic() < limit:
        if all(other.exists() and int(other.read_text() or -1) >= step for other in others):
            return
        time.sleep(0.01)


wished = {} if mark.exists() else {name: wish(name, "").split() for name in ("DIE", "HANG")}
latest = folder / "latest"
begin = int(latest.read_text().removeprefix("global_step")) if latest.exists() and latest.read_text() else 0
place = {"args": sys.argv[1:], "env": dict(os.environ), "node": wish("SLURMD_NODENAME", os.uname().nodename)}
Path(wish("REPORTS", "."), f"report_{rank}_{begin}.json").write_text(json.dumps(place))
say(f"BEGIN {rank} {begin} pid {os.getpid()}")
print(f"stderr of rank {rank}", file=sys.stderr, flush=True)
for step in range(begin, int(wish("STEPS", "3"))):
    for name, (*where, last) in ((name, words) for name, words in wished.items() if words):
        if name == "HANG" and [*where, last] == [str(rank), str(step)]:
            mark.touch()
            time.sleep(3600)
        if name == "DIE" and where == [str(rank), str(step)]:
            mark.touch() if wish("ONCE") else None
            if last == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            say(f"DYING {rank} {step}")
            sys.exit(int(last))
    together(step)
    time.sleep(float(wish("STEP_S", "0.05")))
    say(f"STEP {rank} {step}")
    if received:
        if signal.Signals(received[0]).name in wish(
            "SAVES_ON", "SIGUSR1"
        ):  # not when a launcher ends what is left of it
            save(step + 1)
            say(f"SAVED {rank} {step + 1} {received[0]}")
        sys.exit(128 + received[0])
    if (step + 1) % int(wish("SAVE_EVERY", "1000000")) == 0:
        save(step + 1)
say(f"DONE {rank}")
