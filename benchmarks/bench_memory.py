"""Resident bytes per parameter and rank, measured: AMP and the levels, ZeRO stages 0 to 3, two and four ranks.

Each job is started from JSON, trained for two steps, and then measured twice: with the gradients of a third step in
place, and after that step. Counted are the distinct storages of all tensors that the process holds (Python's garbage
collector lists them), less those that existed before the engine was made. Beside it stands the growth of the process
itself during the step: the kernel's high-water mark is reset just before and read just after.

    python benchmarks/bench_memory.py                              everything; some minutes
    python benchmarks/bench_memory.py --stages 2 --worlds 2 --levels AMP O2 --width 512 --write

The formula beside each figure is the package's own cost model (`ds_fp8.cost.memory`), which `ds_fp8 explain` and
`ds_fp8 estimate` print; the program fails when a figure lies more than 3 % and .05 bytes from it. Scales of blocks,
biases and the few fp32 buffers of FP8 layers are left out of it.
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
from living import storages
from ranks import run_ranks

EXPANDED = {"exp_avg": "e4m3_expanded", "exp_avg_sq": "e4m3_expanded"}
JOBS: dict[str, dict[str, Any]] = {
    "AMP": {},
    "fp8": {"fp8": {"enabled": True}},
    "O1": {"msamp": {"enabled": True, "opt_level": "O1"}},
    "O2": {"msamp": {"enabled": True, "opt_level": "O2"}},
    "O2 expanded": {"msamp": {"enabled": True, "opt_level": "O2", **EXPANDED}},
    "O3": {"msamp": {"enabled": True, "opt_level": "O3"}},
    "O3 expanded": {"msamp": {"enabled": True, "opt_level": "O3", **EXPANDED}},
}
"""Sections of the JSON, by the name of the row."""

TOLERANCE, TOLERANCE_BYTES = 0.03, 0.05


def formula(name: str, stage: int, world_size: int, base: str, bucket: float, cached: int) -> tuple[float, float]:
    """(after a step, with gradients), bytes per parameter: `ds_fp8.cost`; `bucket` parameters in a reduction bucket."""
    from ds_fp8.cost.memory import Kept, Placement, bucket_bytes, bytes_of
    from ds_fp8.levels import LEVELS, Level

    sections = JOBS[name].get("msamp")
    level = Level("", "fp32", "fp32", "fp32")
    if sections is not None:
        level = LEVELS[sections["opt_level"]].override(**(EXPANDED if "expanded" in name else {}))
    kept = Kept(level.exp_avg, level.exp_avg_sq, level.master, sections is not None, level.weight_wire != "none")
    where = Placement(stage, world_size, base, cached_weight=0 if name == "AMP" else cached)
    device, _ = bytes_of(kept, where)
    extra = bucket_bytes(where, bucket, 1.0)
    # ZeRO 3 keeps the partition of its gradients; elsewhere they are gone after the step, and so is what a layer kept.
    rest = device.total if stage == 3 else device.total - device.gradients - device.cached
    return rest + extra, device.total + extra


class Mlp(nn.Module):
    """Square layers, all of them aligned for FP8."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.float().square().mean()


def process_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else 0


def measure_all(
    rank: int, world_size: int, jobs: list[tuple[int, str, str]], width: int, depth: int
) -> list[dict[str, Any]]:
    """One job after the other in the same processes: starting them takes longer than the steps."""
    rows = []
    for stage, name, base in jobs:
        found = measure(name, base, stage, width, depth)
        rows.append({"W": world_size, "base": base, "stage": stage, "level": name, **found})
        gc.collect()
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(name: str, base: str, stage: int, width: int, depth: int) -> dict[str, float]:
    import deepspeed

    import ds_fp8
    from ds_fp8.comm import scratch

    ds_fp8.activate()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 16,
        **({base: {"enabled": True}} if base != "fp32" else {}),
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
    config |= JOBS[name]
    torch.manual_seed(0)
    batch = torch.randn(16, width, dtype=torch.bfloat16 if base == "bf16" else torch.float32)
    before = storages()
    engine, *_ = deepspeed.initialize(model=Mlp(width, depth), config=config)
    numel = depth * (width * width + width)
    attachment = ds_fp8.engine.of(engine)
    cached = 0
    if attachment is not None:
        from ds_fp8.plan.estimate import cached_weight

        cached = cached_weight(attachment.plan.fp8)

    def resident() -> int:
        scratch._free.clear()  # message buffers that a CPU keeps between exchanges: at most eight of a round's size
        return sum(size for storage, (size, _) in storages().items() if storage not in before)

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
        "bucket": width * width / numel,
        "cached": cached,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--levels", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--bases", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="write a report under benchmarks/results")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Freed tensors go back to the system at once, so that a step cannot hide its peak in what the step before has
    # freed.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    # O3 needs ZeRO, the plan refuses it in stage 0; expanded states are shown once a stage.
    jobs = [
        (stage, level, base)
        for base in options.bases
        for stage in options.stages
        for level in options.levels
        if level not in (("O2 expanded",) if stage else ("O3", "O3 expanded"))
    ]
    rows, wrong = [], 0
    for world_size in options.worlds:
        ranks = run_ranks(world_size, measure_all, jobs, options.width, options.depth, timeout_s=3600)
        for of_ranks in zip(*ranks, strict=True):
            worst = {
                key: max(found[key] for found in of_ranks) for key in ("after_step", "with_gradients", "peak_extra")
            }
            row = {key: of_ranks[0][key] for key in ("W", "base", "stage", "level")}
            row |= {key: round(value, 2) for key, value in worst.items()}
            given = (world_size, row["base"], of_ranks[0]["bucket"], of_ranks[0]["cached"])
            expected = formula(row["level"], row["stage"], *given)
            row["formula"], row["formula_with_gradients"] = (round(value, 2) for value in expected)
            pairs = zip((worst["after_step"], worst["with_gradients"]), expected, strict=True)
            row["agrees"] = all(abs(found - value) <= TOLERANCE * value + TOLERANCE_BYTES for found, value in pairs)
            wrong += not row["agrees"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.write:
        print(write_report(rows, options))
    if wrong:
        print(f"{wrong} of {len(rows)} rows are not what the cost model says")
    return int(wrong > 0)


def write_report(rows: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    """A table per world size under `results/`, named after the hardware and the month."""
    import datetime

    lines = ["# Resident bytes per parameter and rank", ""]
    lines.append(
        f"`python benchmarks/bench_memory.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {harness.cpu_name()};"
    )
    lines += [", ".join(f"{name} {version}" for name, version in harness.versions().items()) + ".", ""]
    lines.append(
        "Of all tensors: after a step, and with the gradients of the next in place. Peak: growth of the process in the "
        "step."
    )
    lines += [
        "",
        "| W | base | stage | level | after step | model | with gradients | model | peak extra |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['W']} | {row['base']} | {row['stage']} | {row['level']} | {row['after_step']} | {row['formula']} "
            f"| {row['with_gradients']} | {row['formula_with_gradients']} | {row['peak_extra']} |"
        )
    path = harness.RESULTS / f"memory_{harness.hardware_slug()}_{datetime.date.today():%Y%m}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
