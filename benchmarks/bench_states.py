"""How many bytes does a parameter cost the optimizer, and how many more during the step? Measured, not computed.

    resident   bytes of all storages that a partition's step holds on to: the 16-bit weight, states, master; each
               storage once, however many tensors look at it. Beside it the formula of `ds_fp8.levels`.
    process    growth of the process' resident memory when the states are made and touched (second opinion, in a child)
    step peak  what the step allocates besides: the process' peak during the step, over what was resident before

AMP is what DeepSpeed keeps for bf16 today: 16-bit weight, fp32 master, fp32 states. Gradients belong to ZeRO and are
the same for all: not counted. `--zero` adds the resident bytes per parameter and rank under ZeRO-2 with a bf16 gradient
partition, by the formula, for world sizes 2 and 4.

    python benchmarks/bench_states.py [--numel 16777216] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from ds_fp8 import kernels
from ds_fp8.levels import LEVELS, MASTERS, STATE_BYTES, Level
from ds_fp8.optim import ScaledAdamW

RESULTS = Path(__file__).resolve().parent / "results"
EXPANDED = {"exp_avg": "e4m3_expanded", "exp_avg_sq": "e4m3_expanded"}
LEVELS_MEASURED: dict[str, Level] = {
    "AMP (fp32 master and states)": LEVELS["O1"].override(master="fp32"),
    "O1": LEVELS["O1"],
    "O2": LEVELS["O2"],
    "O3 (its 16 bits are sharded too)": LEVELS["O3"],
    "O3, fp16 master": LEVELS["O3"].override(master="fp16"),
    "O3 expanded": LEVELS["O3"].override(**EXPANDED),
}


def resident_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def process_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """The most resident memory that this process has had since `forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Start a new peak from the present; where the system does not allow it, the older peak stays (an upper bound)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(name: str, numel: int) -> dict[str, float]:
    """Bytes per parameter of one level, in a process of its own."""
    level = LEVELS_MEASURED[name]
    param = torch.nn.Parameter(torch.full((numel,), 0.5, dtype=torch.bfloat16))
    param.grad = torch.full((numel,), 0.25, dtype=torch.bfloat16)
    small = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    small.grad = torch.ones_like(small)
    ScaledAdamW([small], level=level).step()  # kernels loaded, pools warm
    optimizer = ScaledAdamW([param], level=level)
    before = process_bytes()
    state = optimizer.state_of(param)
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        tensor.add_(0)  # touched, so that the system has given the pages
    optimizer.step()
    grown = process_bytes() - before
    forget_peak()
    base = process_bytes()
    optimizer.step()
    return {
        "storages": resident_bytes([param.detach(), *tensors]) / numel,
        "process": 2 + grown / numel,
        "step_extra": max(peak_bytes() - base, 0) / numel,
        "formula": 2 + MASTERS[level.master].extra_bytes + STATE_BYTES[level.exp_avg] + STATE_BYTES[level.exp_avg_sq],
    }


def zero2_bytes(name: str, formula: float, world_size: int) -> float:
    """Bytes per parameter and rank under ZeRO-2: weights on every rank, the rest and a bf16 gradient by W."""
    sharded = formula - 2 + 2
    return 1 + (sharded + 2) / world_size if name.startswith("O3") else 2 + sharded / world_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the Markdown report")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.numel)))
        return
    lines = [
        "| level | storages | formula | process | step extra | ZeRO-2, W = 2 | W = 4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in LEVELS_MEASURED:
        command = [sys.executable, __file__, "--numel", str(options.numel), "--child", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert abs(found["storages"] - found["formula"]) < 0.01, (name, found)
        found |= {f"zero2_w{world}": zero2_bytes(name, found["formula"], world) for world in (2, 4)}
        print(json.dumps({"bench": "states", "level": name, **{key: round(value, 3) for key, value in found.items()}}))
        keys = ("storages", "formula", "process", "step_extra", "zero2_w2", "zero2_w4")
        lines.append(f"| {name} | {' | '.join(f'{found[key]:.2f}' for key in keys)} |")
    if options.write:
        now = datetime.datetime.now(datetime.timezone.utc)
        head = [
            "# Bytes per parameter of the optimizer, measured",
            "",
            (
                f"{now:%Y-%m-%d}, CPU ({kernels.path('cpu')}), python {platform.python_version()}, "
                f"torch {torch.__version__}  "
            ),
            f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`",
            "",
            "Weight, states and master of one bf16 partition; the columns are explained in the benchmark's docstring.",
            "",
        ]
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"states_cpu_{now:%Y%m}.md"
        file.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        print(f"written: {file.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
