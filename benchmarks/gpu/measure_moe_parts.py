"""Where the time of an expert block goes: each cast and each product alone, FP8 beside bf16, for the shapes of
`measure_moe`.

One row per operation: milliseconds, bytes that it must move at least, and the share of a device copy's rate that it
reaches. `ds_fp8.plan` decides per product by these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ledger import Ledger, main
from timing import alternate, copy_bytes_per_ms, free

from ds_fp8.formats import E4M3
from ds_fp8.kernels import grouped as casts
from ds_fp8.layers import grouped_high, grouped_rows
from ds_fp8.layers.groups import Groups, Layout, Stack

SHAPES: dict[str, tuple[int, int, int, int, bool]] = {
    "Mixtral up": (8, 28672, 4096, 16384, False),
    "Mixtral down": (8, 4096, 14336, 16384, False),
    "gpt-oss up": (32, 5760, 2880, 32768, True),
    "gpt-oss down": (32, 2880, 2880, 32768, True),
    "Qwen3 up": (128, 1536, 2048, 65536, False),
    "Qwen3 down": (128, 2048, 768, 65536, False),
}
"""Name -> experts, out, in, rows, whether the weight lies as [in, out]; the models of `measure_moe`."""


def works_of(experts: int, n: int, k: int, rows: int, transposed: bool) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (call, bytes that it reads and writes at least; 0: a product)."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    counts = torch.randint(experts, (rows,), device="cuda", generator=generator).bincount(minlength=experts)
    groups = Groups(counts, rows)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    weight = weight.transpose(1, 2).contiguous() if transposed else weight
    stack = Stack(weight, Layout(transposed))
    coded_x, coded_gradient = casts.quantize_rows(x, E4M3), casts.quantize_rows(gradient, E4M3)
    kept = grouped_rows.keep_for_wgrad(x, groups)
    kept_gradient = grouped_rows.keep_for_wgrad(gradient, groups)
    along_inputs, along_outputs = grouped_rows.along_inputs(stack), grouped_rows.along_outputs(stack)
    amax_x, amax_weight = casts.column_amaxes(x, groups.table), casts.column_amaxes(weight, None)
    amax_gradient = casts.column_amaxes(gradient, groups.table)
    bf16, table, room = torch.bfloat16, groups.table, groups.room
    size = experts * n * k

    def columns(of: torch.Tensor, amax: torch.Tensor, where: torch.Tensor | None) -> Callable[[], Any]:
        return lambda: casts.quantize_columns(of, amax, E4M3, where, room if where is not None else 0)

    return {
        "input rows": (lambda: casts.quantize_rows(x, E4M3), 3 * rows * k),
        "input column amaxes": (lambda: casts.column_amaxes(x, table), 2 * rows * k),
        "input columns": (columns(x, amax_x, table), 3 * rows * k),
        "gradient rows": (lambda: casts.quantize_rows(gradient, E4M3), 3 * rows * n),
        "gradient rows, column amaxes": (lambda: casts.quantize_rows_measured(gradient, E4M3, table), 3 * rows * n),
        "gradient column amaxes": (lambda: casts.column_amaxes(gradient, table), 2 * rows * n),
        "gradient columns": (columns(gradient, amax_gradient, table), 3 * rows * n),
        "weight rows": (lambda: casts.quantize_rows(weight, E4M3), 3 * size),
        "weight rows, column amaxes": (lambda: casts.quantize_rows_measured(weight, E4M3, None), 3 * size),
        "weight column amaxes": (lambda: casts.column_amaxes(weight, None), 2 * size),
        "weight columns": (columns(weight, amax_weight, None), 3 * size),
        "fprop fp8": (lambda: grouped_rows.by_rows(coded_x, along_inputs, groups, bf16), 0),
        "fprop bf16": (lambda: grouped_high.by_rows(x, stack.straight, groups), 0),
        "dgrad fp8": (lambda: grouped_rows.by_rows(coded_gradient, along_outputs, groups, bf16), 0),
        "dgrad bf16": (lambda: grouped_high.by_rows(gradient, stack.straight.transpose(1, 2), groups), 0),
        "wgrad fp8": (lambda: grouped_rows.by_columns(kept_gradient, kept, groups, bf16, transposed), 0),
        "wgrad bf16": (lambda: grouped_high.wgrad(gradient, x, groups, bf16, transposed), 0),
    }


def body(ledger: Ledger) -> None:
    rate = copy_bytes_per_ms(2**28)
    ledger.record("copy, GB/s", round(rate / 1e6))
    for name, shape in SHAPES.items():
        if ledger.left() < 8:
            ledger.problem(name, "no time left")
            continue
        works = works_of(*shape)
        rows = []
        for key, (work, moved) in works.items():
            try:
                ms = alternate({key: work}, repeats=5, warmup=2)[key]["ms"]
            except Exception as problem:  # noqa: BLE001 - which ones run is a finding
                ledger.problem(f"{name} {key}", f"{type(problem).__name__}: {str(problem)[:200]}")
                continue
            share = round(moved / rate / ms, 2) if moved else ""
            rows.append({"shape": name, "operation": key, "ms": ms, "share of copy": share})
        ledger.record(name, rows)
        del works
        free()


if __name__ == "__main__":
    main("moe_parts", body)
