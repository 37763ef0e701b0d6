"""Ranks and a private network for the wire benchmarks: processes over gloo in a network namespace of their own.

A namespace has nothing but a loopback, so its byte counters count the job alone, and `tc` can make it as slow as a
cluster's network without touching the machine's. Needs root, `unshare`, `ip` and `tc` (Debian: iproute2, util-linux).
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed ds_fp8


def sent_bytes(interface: str = "lo") -> int:
    """Bytes that left through `interface` of this namespace, as the kernel counts them."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise RuntimeError(f"no interface {interface} in /proc/net/dev")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(rank: int, world_size: int, port: int, out: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # inference only, 40 s of compiler
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    result = work(rank, world_size, *args)
    Path(out, str(rank)).write_bytes(pickle.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(rank, world_size, *args)` on every rank; results by rank."""
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(_main, (world_size, _free_port(), out, work, args), nprocs=world_size)
        return [pickle.loads(Path(out, str(rank)).read_bytes()) for rank in range(world_size)]


def in_namespace(script: str, arguments: list[str], *, rate: str | None) -> Any:
    """Run `script arguments` in a network namespace whose loopback carries `rate` (`1gbit`), or all it can.

    The script prints one JSON document as its last line, which comes back.
    """
    setup = ["ip link set lo up"]
    if rate is not None:
        setup.append(f"tc qdisc add dev lo root tbf rate {rate} burst 4mb latency 50ms")
    command = " && ".join([*setup, " ".join([sys.executable, str(ROOT / "benchmarks" / script), *arguments])])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", command], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed in its namespace:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
