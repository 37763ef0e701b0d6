"""Device and host times, the same way in every measurement: warm up, then medians over alternated repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], Any]


def alternate(works: dict[str, Work], *, repeats: int = 10, warmup: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds of each work: median and spread, the works taking turns so that clocks and heat hit all alike.

    Each measurement is one call between two device events.
    """
    for work in works.values():
        for _ in range(warmup):
            work()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: {"ms": round(statistics.median(found), 4), "spread": round(max(found) - min(found), 4)}
            for name, found in times.items()}  # fmt: skip


def host_ms(work: Work, *, repeats: int = 30, warmup: int = 10) -> float:
    """Median milliseconds that the host needs to enqueue one call."""
    for _ in range(warmup):
        work()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return round(statistics.median(found) * 1e3, 4)


def copy_bytes_per_ms(numel: int = 2**30) -> float:
    """Bytes read and written by a device copy of 4 GiB, per millisecond: the ceiling of one-pass kernels."""
    source = torch.empty(numel, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    found = alternate({"copy": lambda: target.copy_(source)})["copy"]["ms"]
    return 2 * source.nbytes / found


def free() -> None:
    """Give the memory of finished measurements back before the next."""
    import gc

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
