"""`ds_fp8 doctor FILE --every-rank`: the job's launcher starts this in place of the script, once for each rank.

A job of many nodes fails when one of them has a fault: no plugin on node 2, a lost GPU, a blocked network. So every
rank looks (the first rank of a node at its machine, all of them at their GPU), all of them meet in a store, and if
nobody found a fault they make one small all-reduce. Rank 0 prints one report; every rank returns the same exit code.
All of it ends within a bound, and ranks that did not come are named.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from .probes import Finding

NUMEL = 1 << 18
"""Elements of the all-reduce, fp32: 1 MiB."""


def meet(look: Callable[[], Sequence[Finding]], within_s: float) -> int:
    """Exit code 0: every rank can run the job; 1: some cannot; 2: not started by a launcher."""
    try:
        rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        print(f"ds_fp8 doctor --every-rank: {error} is not set: it runs under the job's launcher", file=sys.stderr)
        return 2
    from torch.distributed import TCPStore

    deadline = time.monotonic() + within_s * 0.9
    try:
        store = TCPStore(
            address, port, None, rank == 0, timedelta(seconds=within_s * 0.9), wait_for_workers=False, use_libuv=True
        )
    except (RuntimeError, OSError) as error:
        print(
            f"ds_fp8 doctor: rank {rank} on {socket.gethostname()} cannot reach {address}:{port}: {error}", flush=True
        )
        return 1
    report = {"host": _host(), "faults": [*_faults(look(), local_rank), *_gpu_faults(local_rank)]}
    store.set(f"report/{rank}", json.dumps(report))
    if store.add("reports", 1) == world_size:
        store.set("all", "1")
    if rank == 0:
        lines = _judge(store, world_size, deadline)
        store.set("verdict", json.dumps(lines))
    code = 1
    try:
        store.wait(["verdict"], timedelta(seconds=max(1.0, deadline - time.monotonic() + 5)))
        lines = json.loads(store.get("verdict"))
        code = int(bool(lines)) or _reduce(store, rank, world_size, local_rank, max(10.0, deadline - time.monotonic()))
    except RuntimeError as error:
        lines = [f"rank {rank} on {_host()}: no verdict of rank 0: {error}"]
    if rank == 0:
        for line in lines:
            print(f"FAIL: {line}")
        done = "" if code else f", {NUMEL * 4 >> 10} KiB reduced over all"
        print(f"{len(lines) or 'no'} fault(s) on {world_size} ranks{done}", flush=True)
    store.add("left", 1)
    while rank == 0 and store.add("left", 0) < world_size and time.monotonic() < deadline:
        time.sleep(0.1)  # the store ends with this process
    return code


def _judge(store: Any, world_size: int, deadline: float) -> list[str]:
    """Every fault once, with the hosts that have it; ranks that did not come."""
    try:
        store.wait(["all"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except RuntimeError:
        missing = [rank for rank in range(world_size) if not store.check([f"report/{rank}"])]
        shown = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
        return [
            (
                f"rank {shown} did not answer: no ds_fp8 in the Python there, a dead node, or a network "
                "that lets nobody through"
            )
        ]
    hosts: dict[str, dict[str, None]] = {}
    for rank in range(world_size):
        report = json.loads(store.get(f"report/{rank}"))
        for fault in report["faults"]:
            hosts.setdefault(fault, {})[report["host"]] = None
    return [f"{', '.join([*names][:8])}{', ...' if len(names) > 8 else ''}: {fault}" for fault, names in hosts.items()]


def _host() -> str:
    """As the scheduler calls it, where it has a name of its own for it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _faults(findings: Sequence[Finding], local_rank: int) -> list[str]:
    return [f"{each.what}: {each.found}" for each in findings if each.status == "fail"] if local_rank == 0 else []


def _gpu_faults(local_rank: int) -> list[str]:
    """A GPU for this rank, and no uncorrected memory error in it since the driver was loaded."""
    listed = _smi("--query-gpu=index,ecc.errors.uncorrected.volatile.total")
    if not listed:
        return []
    faults = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(listed) if visible is None else len([each for each in visible.split(",") if each.strip()])
    if local_rank >= max(count, 1) and count != 1:  # 1: the scheduler shows each rank its own
        faults.append(f"{count} GPUs, no one left for local rank {local_rank}")
    if local_rank == 0:
        for line in listed:
            index, _, errors = (part.strip() for part in line.partition(","))
            if errors.isdigit() and int(errors):
                faults.append(f"GPU {index}: {errors} uncorrected memory errors; have it reset or drained")
    return faults


def _smi(query: str) -> list[str]:
    try:
        found = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in found.stdout.splitlines() if line.strip()] if found.returncode == 0 else []


def _reduce(store: Any, rank: int, world_size: int, local_rank: int, within_s: float) -> int:
    """One all-reduce over all ranks by the backend that the job will use; 0 if the sum is right."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("reduce", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=within_s),
        )
        ones = torch.ones(NUMEL, dtype=torch.float32, device=device)
        dist.all_reduce(ones)
        right = bool((ones == world_size).all())
        dist.destroy_process_group()
    except RuntimeError as error:
        print(f"FAIL: {_host()}: rank {rank} cannot reduce with the others: {error}", flush=True)
        return 1
    if not right:
        print(f"FAIL: {_host()}: rank {rank} got a wrong sum from the all-reduce", flush=True)
    return int(not right)
