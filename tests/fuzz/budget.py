"""How long a fuzzer runs: seconds by `DS_FP8_FUZZ_S` (short without it, so that every CI run has its share), and the
seed.

    DS_FP8_FUZZ_S=600 python -m pytest tests/fuzz -s

Each fuzzer begins with the seed of the day, which it prints; `DS_FP8_FUZZ_SEED` repeats a run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator


def seeds(default_s: float, least: int = 1) -> Iterator[int]:
    """Seeds, one for each case, until the time is over and at least `least` were drawn."""
    first = int(os.environ.get("DS_FP8_FUZZ_SEED", time.time_ns() // (86400 * 10**9)))
    limit_s = float(os.environ.get("DS_FP8_FUZZ_S", default_s))
    end, number = time.monotonic() + limit_s, 0
    print(f"fuzz: seeds from {first * 1_000_003}, {limit_s:g} s", flush=True)
    while number < least or time.monotonic() < end:
        yield first * 1_000_003 + number
        number += 1
    print(f"fuzz: {number} cases", flush=True)
