"""Resident bytes per parameter and rank, measured: AMP and the levels, ZeRO stages 0 to 3, two and four ranks.

Each job is started from JSON, trained for two steps, and then measured twice: with the gradients of a third step in
place, and after that step. Counted are the distinct storages of all tensors that the process holds (Python's garbage
collector lists them), less those that existed before the engine was made. Beside it stands the growth of the process
itself during the step: the kernel's high-water mark is reset just before and read just after.

    python benchmarks/bench_memory.py                              everything; some minutes
    python benchmarks/bench_memory.py --stages 2 --worlds 2 --levels AMP O2 --width 512 --write

The formulas are those of docs/numerics.md, 4, for the state after the step: in stages 1 and 2 gradients are more, and FP8
layers keep the codes of their weights (1 byte) from forward to step; scales of blocks, biases and the few fp32 buffers of FP8 layers are left out of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "comm")]

import harness
from ranks import run_ranks

EXPANDED = {"exp_avg": "e4m3_expanded", "exp_avg_sq": "e4m3_expanded"}
LEVELS: dict[str, dict[str, Any] | None] = {
    "AMP": None,
    "O1": {"enabled": True, "opt_level": "O1"},
    "O2": {"enabled": True, "opt_level": "O2"},
    "O2 expanded": {"enabled": True, "opt_level": "O2", **EXPANDED},
    "O3": {"enabled": True, "opt_level": "O3"},
    "O3 expanded": {"enabled": True, "opt_level": "O3", **EXPANDED},
}
SHARDED = {"AMP": 12.0, "O1": 10.0, "O2": 4.07, "O2 expanded": 3.08, "O3": 6.07, "O3 expanded": 5.08}
"""Bytes per parameter of states and masters beside the weights of all ranks."""


def formula(level: str, stage: int, world_size: int) -> float:
    """Weights on every rank, or their share in stage 3; states and masters by W from stage 1 on."""
    weights = 1.0 if level.startswith("O3") and stage in (1, 2) else 2.0
    states = SHARDED[level]
    if level.startswith("O3") and stage in (0, 3):
        states -= 2.0  # the 16-bit half of the master is the weight that the rank keeps anyway
    if stage == 3:
        # The gradient partition lives on between steps, and at O3 the codes of the rank's share lie beside its 16 bits.
        states += 2.0 + (1.0 if level.startswith("O3") else 0.0)
    return weights / (world_size if stage == 3 else 1) + states / (world_size if stage else 1)


class Mlp(nn.Module):
    """Square layers, all of them aligned for FP8."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.float().square().mean()


def storages() -> dict[int, int]:
    """Bytes of every storage that a living tensor has."""
    gc.collect()
    found = {}
    for candidate in gc.get_objects():
        if isinstance(candidate, torch.Tensor) and candidate.device.type == "cpu":
            storage = candidate.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def process_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else 0


def measure_all(
    rank: int, world_size: int, jobs: list[tuple[int, str]], width: int, depth: int
) -> list[dict[str, Any]]:
    """One job after the other in the same processes: starting them takes longer than the steps."""
    rows = []
    for stage, level in jobs:
        found = measure(rank, world_size, level, stage, width, depth)
        rows.append({"W": world_size, "stage": stage, "level": level, **found})
        gc.collect()
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(rank: int, world_size: int, level: str, stage: int, width: int, depth: int) -> dict[str, float]:
    import deepspeed

    import ds_fp8

    ds_fp8.activate()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 16,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": width * width,
            "allgather_bucket_size": width * width,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": width * width,
            "stage3_max_live_parameters": 0,
        },
        "steps_per_print": 10**9,
    }
    if LEVELS[level] is not None:
        config["msamp"] = LEVELS[level]
    torch.manual_seed(0)
    batch = torch.randn(16, width, dtype=torch.bfloat16)
    before = storages()
    engine, *_ = deepspeed.initialize(model=Mlp(width, depth), config=config)
    numel = depth * (width * width + width)
    bucket = width * width * 4  # two buckets of DeepSpeed's, in bf16

    def resident() -> int:
        return sum(size for pointer, size in storages().items() if pointer not in before)

    for _ in range(2):
        engine.backward(engine(batch))
        engine.step()
    loss = engine(batch)
    engine.backward(loss)
    del loss
    with_gradients = resident()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    started = process_bytes("VmRSS")
    engine.step()
    peak = process_bytes("VmHWM") - started
    after = resident()
    engine.destroy()
    return {
        "with_gradients": with_gradients / numel,
        "after_step": after / numel,
        "peak_extra": max(0, peak) / numel,
        "bucket": bucket / numel,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="write a report under benchmarks/results")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Freed tensors go back to the system at once, so that a step cannot hide its peak in what the step before has freed.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    # O3 needs ZeRO, the plan refuses it in stage 0; expanded states are shown once a stage.
    jobs = [
        (stage, level)
        for stage in options.stages
        for level in options.levels
        if level not in (("O2 expanded",) if stage else ("O3", "O3 expanded"))
    ]
    rows = []
    for world_size in options.worlds:
        ranks = run_ranks(world_size, measure_all, jobs, options.width, options.depth, timeout_s=3600)
        for of_ranks in zip(*ranks, strict=True):
            worst = {
                key: max(found[key] for found in of_ranks) for key in ("after_step", "with_gradients", "peak_extra")
            }
            row = {key: of_ranks[0][key] for key in ("W", "stage", "level")}
            row |= {key: round(value, 2) for key, value in worst.items()}
            row["formula"] = round(formula(row["level"], row["stage"], world_size), 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.write:
        print(write_report(rows, options))
    return 0


def write_report(rows: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    """A table per world size under `results/`, named after the hardware and the month."""
    import datetime

    lines = ["# Resident bytes per parameter and rank", ""]
    lines.append(
        f"`python benchmarks/bench_memory.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {harness.cpu_name()};"
    )
    lines += [", ".join(f"{name} {version}" for name, version in harness.versions().items()) + ".", ""]
    lines.append(
        "Of all tensors: after a step, and with the gradients of the next in place. Peak: growth of the process in the step."
    )
    lines += [
        "",
        "| W | stage | level | after step | formula | with gradients | peak extra |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['W']} | {row['stage']} | {row['level']} | {row['after_step']} | {row['formula']} | "
            f"{row['with_gradients']} | {row['peak_extra']} |"
        )
    path = harness.RESULTS / f"memory_{harness.hardware_slug()}_{datetime.date.today():%Y%m}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
