"""Real ranks for tests: processes over gloo, or over NCCL with a GPU each, started fresh so that nothing is inherited.

`run_ranks(world_size, work, *args)` calls `work(rank, world_size, *args)` in each process with `deepspeed.comm` up,
and returns what they returned. `work` must be importable (a module-level function). The rendezvous is a file, so no
port can collide.
"""

from __future__ import annotations

import io
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def init_comm(rank: int, world_size: int, rendezvous: str, backend: str) -> None:
    """torch's group by file, then DeepSpeed on top of it. `nccl` carries no CPU tensors, `cpu:gloo,cuda:nccl` both."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if backend == "gloo" else "cuda")
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Only inference uses this op, and on Linux it would be compiled here for 40 s.
    __compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _rank_main(
    rank: int, world_size: int, rendezvous: str, backend: str, results: Any, work: Callable[..., Any], args: Any
) -> None:
    try:
        init_comm(rank, world_size, rendezvous, backend)
        # By value: a tensor in shared memory would die with this process before the parent has read it.
        saved = io.BytesIO()
        torch.save(work(rank, world_size, *args), saved)
        results.put((rank, saved.getvalue(), None))
    except BaseException:  # noqa: BLE001  reported by the parent, whatever it is
        results.put((rank, None, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 240.0, backend: str = "gloo"
) -> list[Any]:
    """Run `work` on `world_size` ranks; the results by rank. A rank that fails fails the call, with its traceback."""
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        processes = [
            context.Process(
                target=_rank_main, args=(rank, world_size, rendezvous, backend, results, work, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            collected: dict[int, Any] = {}
            for _ in processes:
                rank, value, error = results.get(timeout=timeout_s)
                if error is not None:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{error}")
                collected[rank] = torch.load(io.BytesIO(value), map_location="cpu", weights_only=False)
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.terminate()
    return [collected[rank] for rank in range(world_size)]
