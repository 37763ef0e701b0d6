"""What this machine is and what it can do: the facts that the plan, the kernels and the tests rely on.

Versions; which FP8 recipes Transformer Engine accepts here; which scalings `torch._scaled_mm` really runs, with which
strides, how exact and how fast; what a CUDA cast does with overflow; the copy bandwidth that all one-pass kernels are
measured against; the host time of a layer call.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from ledger import Ledger, main

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def milliseconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """Median device time of one call, from events around each of `repeats` calls."""
    for _ in range(3):
        work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in marks:
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in marks)
    return times[len(times) // 2]


def machine() -> dict[str, Any]:
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        found = subprocess.run(smi, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        found = str(error)
    properties = torch.cuda.get_device_properties(0)
    facts = {"nvidia-smi": found, "torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    facts |= {"capability": torch.cuda.get_device_capability(), "multiprocessors": properties.multi_processor_count}
    return facts | {"memory_GiB": round(properties.total_memory / 2**30, 1), "nccl": torch.cuda.nccl.version()}


def transformer_engine_facts() -> dict[str, Any]:
    import transformer_engine
    import transformer_engine.pytorch as te

    facts: dict[str, Any] = {"version": transformer_engine.__version__}
    for kind in ("fp8", "fp8_block_scaling", "mxfp8", "nvfp4"):
        ask = getattr(te, f"is_{kind}_available", None)
        facts[kind] = ask(return_reason=True) if ask else "no such function"
    return facts


def casts(dtype: torch.dtype) -> dict[str, Any]:
    """Quantized values that torch's CUDA cast gives for hazardous values, and for all 65536 bf16 values against the
    CPU's.
    """
    hazards = [448.0, 464.0, 465.0, 480.0, 1000.0, 57344.0, 61440.0, 61441.0, float("inf"), float("nan"), 2.0**-10]
    quantized = torch.tensor(hazards, device="cuda").to(dtype).view(torch.uint8).tolist()
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    limit = 448.0 if dtype == E4M3 else 57344.0
    clamped = every[~every.isnan()].clamp(-limit, limit)
    same = clamped.cuda().to(dtype).view(torch.uint8).cpu() == clamped.to(dtype).view(torch.uint8)
    # Halfway cases and their fp32 neighbours: where rounding modes would differ.
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[grid.isfinite()].sort().values
    middle = (grid[1:] + grid[:-1]) / 2
    around = torch.cat([middle, middle.nextafter(grid[1:]), middle.nextafter(grid[:-1])])
    halves = around.cuda().to(dtype).view(torch.uint8).cpu() == around.to(dtype).view(torch.uint8)
    listed = {str(value): code for value, code in zip(hazards, quantized, strict=True)}
    differ = {"clamped bf16 values that differ from CPU": int((~same).sum())}
    return listed | differ | {"halfway cases that differ from CPU": int((~halves).sum())}


def scaled_products(size: int) -> list[dict[str, Any]]:
    """Every scaling that `torch._scaled_mm` might take: does it run, how exact, how fast at `size` cubed."""
    generator = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(size, size, device="cuda", generator=generator)
    b = torch.randn(size, size, device="cuda", generator=generator)
    blocks = size // 128
    one = torch.ones((), device="cuda")
    rows = torch.ones(size, 1, device="cuda")
    # Scales of 1x128 groups are wanted with the outer dimension contiguous.
    groups = torch.ones(blocks, size, device="cuda").t()
    tiles = torch.ones(blocks, blocks, device="cuda").t()
    variants: list[tuple[str, torch.Tensor, torch.Tensor]] = [
        ("tensorwise", one, one),
        ("rowwise", rows, rows.t().contiguous()),
        ("1x128 by 128x128", groups, tiles),
        ("1x128 by 1x128", groups, groups.t()),
        ("128x128 by 1x128", tiles, groups.t()),
        ("1x128 by 128x128, row-major scales", groups.contiguous(), tiles.contiguous()),
    ]
    table = []
    reference = milliseconds(lambda: a.bfloat16() @ b.bfloat16().t())
    half_a, half_b = a.bfloat16(), b.bfloat16()
    reference = milliseconds(lambda: half_a @ half_b.t())
    for types in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)):
        quantized_a, quantized_b = a.to(types[0]), b.to(types[1])
        exact = quantized_a.float() @ quantized_b.float().t()
        for name, scale_a, scale_b in variants:
            for output in (torch.bfloat16, torch.float32):
                for fast in (False, True):
                    row = {"scaling": name, "a": str(types[0])[6:], "b": str(types[1])[6:]}
                    row |= {"output": str(output)[6:], "fast_accum": fast}

                    def product(fast=fast, output=output, sa=scale_a, sb=scale_b, ca=quantized_a, cb=quantized_b):
                        return torch._scaled_mm(ca, cb.t(), sa, sb, out_dtype=output, use_fast_accum=fast)

                    try:
                        result = product().float()
                        row["error"] = f"{float((result - exact).norm() / exact.norm()):.2e}"
                        row["ms"] = round(milliseconds(product), 4)
                        row["bf16 ms"] = round(reference, 4)
                    except Exception as error:  # noqa: BLE001 - which variants fail is the finding
                        row["error"] = str(error).splitlines()[0][:120]
                    table.append(row)
    return table


def layouts() -> dict[str, str]:
    """Which operand layouts the FP8 product takes: dgrad and wgrad need transposed data where it does not."""
    a = torch.randn(256, 512, device="cuda").to(E4M3)
    b = torch.randn(128, 512, device="cuda").to(E4M3)
    one = torch.ones((), device="cuda")
    column_a = a.t().contiguous().t()
    row_b = b.t().contiguous()
    cases = {"a row, b column": (a, b.t()), "a row, b row": (a, row_b)}
    cases |= {"a column, b column": (column_a, b.t()), "a column, b row": (column_a, row_b)}
    found = {}
    for name, (left, right) in cases.items():
        try:
            torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)
            found[name] = "runs"
        except Exception as error:  # noqa: BLE001 - which layouts fail is the finding
            found[name] = str(error).splitlines()[0][:120]
    for rows in (1, 8, 16, 24, 40):
        try:
            torch._scaled_mm(a[:rows], b.t(), one, one, out_dtype=torch.bfloat16)
            found[f"{rows} rows in a"] = "runs"
        except Exception as error:  # noqa: BLE001 - which sizes fail is the finding
            found[f"{rows} rows in a"] = str(error).splitlines()[0][:120]
    return found


def bandwidth() -> dict[str, float]:
    """Bytes read and written per second by a device copy of 4 GiB: the ceiling of every one-pass kernel."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), 10)
    return {"copy_TB_per_s": round(2 * source.nbytes / copy_ms / 1e9, 3)}


def triton_probe() -> dict[str, Any]:
    import triton

    return {"version": triton.__version__, "note": "kernels are checked by the tests marked gpu"}


def host_time() -> dict[str, Any]:
    """Host microseconds of one forward and backward of a small layer: what a layer costs before any arithmetic."""
    import time

    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    found = {}
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    baseline = torch.nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
    engine = te.Linear(256, 256, device="cuda", params_dtype=torch.bfloat16)
    for name, layer in (("nn.Linear", baseline), ("te.Linear delayed", engine), ("te.Linear current", engine)):
        scaling = recipe.Float8CurrentScaling() if "current" in name else recipe.DelayedScaling()

        def once(layer=layer, scaling=scaling, fp8=layer is engine):
            if fp8:
                with te.fp8_autocast(enabled=True, fp8_recipe=scaling):
                    output = layer(x)
            else:
                output = layer(x)
            output.backward(output)

        for _ in range(20):
            once()
        torch.cuda.synchronize()
        times = []
        for _ in range(100):
            start = time.perf_counter()
            once()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        found[name + ", us"] = round(sorted(times)[50] * 1e6, 1)
    return found


def body(ledger: Ledger) -> None:
    ledger.attempt("machine", machine)
    ledger.attempt("transformer_engine", transformer_engine_facts)
    ledger.attempt("triton", triton_probe)
    ledger.attempt("cuda cast to e4m3", lambda: casts(E4M3))
    ledger.attempt("cuda cast to e5m2", lambda: casts(E5M2))
    ledger.attempt("bandwidth", bandwidth)
    ledger.attempt("scaled_mm layouts", layouts)
    ledger.attempt("scaled_mm 4096", lambda: scaled_products(4096), needs_s=30)
    ledger.attempt("host time", host_time)


if __name__ == "__main__":
    main("env", body)
