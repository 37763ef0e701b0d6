"""Run the features on the installed DeepSpeed; one line of JSON:   python tests/releases/run.py [feature ...]

Two ranks over gloo. A feature that fails on one rank fails; the ranks agree after each, so that the next one starts
level. Last comes `uncalled`: overridden methods of DeepSpeed that no feature has called, which a table would promise
blindly.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

LIMIT_S = 600


def rank_main(rank: int, rendezvous: str, names: list[str], results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__

    # Only inference uses this op, and on Linux it would be compiled here for 40 s.
    __compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT_S)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    import called
    from features import FEATURES

    unused = called.watch()
    # DeepSpeed before 0.18.8 collects garbage a dozen times in each `initialize`: nine tenths of the time of a run,
    # unless what the imports have made is left out.
    gc.freeze()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = [folder]
        torch.distributed.broadcast_object_list(place)
        for name in names or FEATURES:
            began, problem = time.monotonic(), ""
            try:
                FEATURES[name](Path(place[0]))
            except Exception as error:  # noqa: BLE001  any failure is a cell of the table
                problem = f"{type(error).__name__}: {error}"
                print(f"rank {rank}: {name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            problems: list[Any] = [None, None]
            torch.distributed.all_gather_object(problems, problem)
            found[name] = next((text for text in problems if text), "")
            print(f"{name}: {found[name] or 'ok'} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        torch.distributed.barrier()
    results.put((rank, found, sorted(unused())))


def main(names: list[str]) -> int:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        work = [
            context.Process(target=rank_main, args=(rank, f"{folder}/rendezvous", names, results)) for rank in (0, 1)
        ]
        for process in work:
            process.start()
        answers = {}
        while len(answers) < 2:
            if not results.empty():
                rank, found, unused = results.get()
                answers[rank] = (found, unused)
            elif any(process.exitcode not in (None, 0) for process in work):
                break
            else:
                time.sleep(0.2)
        for process in work:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    from table import failures

    release = metadata.version("deepspeed")
    if len(answers) < 2:
        print(json.dumps({"deepspeed": release, "features": {}, "error": "a rank died"}))
        return 1
    features = answers[0][0]
    uncalled = sorted(set(answers[0][1]) & set(answers[1][1]))
    versions = f"Python {platform.python_version()}, torch {metadata.version('torch')}"
    answer = {"deepspeed": release, "versions": versions, "features": features, "uncalled": uncalled}
    print(json.dumps(answer))
    return int(bool(failures(answer)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
