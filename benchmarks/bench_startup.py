"""What the door costs: Python's start without DeepSpeed, and the import of DeepSpeed, with and without the plugin.

    python benchmarks/bench_startup.py [--repeats 20]

Needs an installed ds_fp8 (its .pth in site-packages); `without` is the same Python with the plugin's files hidden, i.e. a
site-packages that lacks them. Runs alternate, so that a busy machine disturbs both alike. Targets: under 1 ms for Python's
start, under 1 % for DeepSpeed's import. The start is overstated: with -S nobody has looked into site-packages yet, and that
first look, which an ordinary start has behind it, is counted as the door's. In a virtual environment with the .pth renamed
away and back, 80 pairs, the difference was 0.57 ms (November 2026); hooking a DeepSpeed that is imported took 0.3 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

START = "pass"
IMPORT = "import deepspeed"

# `-S` keeps .pth files from being run; adding the folder to sys.path by hand gives a Python that has all packages and no
# door. With the door, the same line is followed by what the .pth says.
SITE = "import sys; sys.path[1:1] = {paths!r}"


def seconds(code: str) -> float:
    """Wall time of a fresh Python that runs `code`."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment(), stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DS_FP8_DISABLE")}
    return {**env, "DS_ACCELERATOR": env.get("DS_ACCELERATOR", "cpu"), "PYTHONDONTWRITEBYTECODE": "0"}


def measure(code: str, repeats: int) -> dict[str, float]:
    """Medians in ms of both Pythons and of their difference, pair by pair."""
    site = SITE.format(paths=[path for path in sys.path if path.endswith("-packages")] or sys.path[1:])
    plain, hooked = f"{site}; {code}", f"{site}; import ds_fp8; {code}"
    seconds(plain), seconds(hooked)
    pairs = [(seconds(plain), seconds(hooked)) for _ in range(repeats)]
    differences = sorted(with_door - without for without, with_door in pairs)
    return {
        "without_ms": 1e3 * statistics.median(without for without, _ in pairs),
        "with_ms": 1e3 * statistics.median(with_door for _, with_door in pairs),
        "difference_ms": 1e3 * statistics.median(differences),
        "spread_ms": 1e3 * (differences[3 * len(differences) // 4] - differences[len(differences) // 4]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    check = "import ds_fp8, deepspeed; assert ds_fp8.is_active()"
    subprocess.run([sys.executable, "-c", check], check=True, env=environment(), stdout=subprocess.DEVNULL)
    for what, code, factor in (("python_start", START, 3), ("import_deepspeed", IMPORT, 1)):
        found = measure(code, repeats * factor)
        share = found["difference_ms"] / found["without_ms"]
        print(
            json.dumps(
                {
                    "benchmark": what,
                    **{name: round(value, 3) for name, value in found.items()},
                    "share": round(share, 4),
                }
            )
        )


if __name__ == "__main__":
    main()
