"""Peak memory and time of ZeRO 2's step on one GPU, with the gradients of a partition in pieces of different sizes.

python3 benchmarks/gpu/measure_step_peak.py --log2-chunk 26      2^26 elements, as the optimizer takes on a GPU
python3 benchmarks/gpu/measure_step_peak.py --log2-chunk 34      the whole partition at once, as DeepSpeed has it
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

WIDTH, DEPTH, STEPS = 4096, 72, 8
PARAMETERS = WIDTH * WIDTH * DEPTH
"""1.2 billion."""


class Mlp(nn.Module):
    """Square layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x.float().square().mean()


def measure(level: str, chunk: int) -> dict[str, float | str | int]:
    import deepspeed

    import ds_fp8
    from ds_fp8.optim import pieces

    ds_fp8.activate()
    pieces.GPU_NUMEL = chunk
    before = torch.cuda.memory_allocated()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
        "msamp": {"enabled": True, "opt_level": level},
    }
    engine, *_ = deepspeed.initialize(model=Mlp(), config=config)
    x = torch.randn(8, WIDTH, dtype=torch.bfloat16, device="cuda")
    times, with_gradients, peak = [], 0, 0
    for _ in range(STEPS):
        engine.backward(engine(x))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with_gradients = torch.cuda.memory_allocated() - before
        started = time.perf_counter()
        engine.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
        peak = torch.cuda.max_memory_allocated() - before
    rest = torch.cuda.memory_allocated() - before
    return {
        "level": level,
        "chunk": chunk,
        "rest": round(rest / PARAMETERS, 2),
        "with_gradients": round(with_gradients / PARAMETERS, 2),
        "peak_in_step": round(peak / PARAMETERS, 2),
        "ms": round(sorted(times[2:])[(STEPS - 2) // 2], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--log2-chunk", type=int, default=26)
    parser.add_argument("--levels", nargs="+", default=["O2", "O3"])
    options = parser.parse_args()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "RANK": "0", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("WORLD_SIZE", "1")
    for level in options.levels:
        print(json.dumps(measure(level, 2**options.log2_chunk)), flush=True)
        gc.collect()  # an engine of DeepSpeed's outlives destroy(): what it holds is subtracted from the next one


if __name__ == "__main__":
    main()
