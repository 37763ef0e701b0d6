"""LoRA on 8B-width layers under ZeRO-2: the frozen base in FP8, and in FP8 alone (`frozen_weights`), beside bf16.

Llama's shapes (8 layers, hidden 4096, ffn 14336), adapters of rank 16 on every Linear of the layers, micro-batch 4 x
2048. Eager against eager, compiled against compiled. Goal: 1.3x bf16's tokens per second.
"""

from __future__ import annotations

from typing import Any

from jobs import FP8, train
from ledger import Ledger, main
from measure_llama import MODELS

COMMON = {"micro_batch": 4, "context": 2048, "gas": 2, "steps": 8, "stage": 2, "llama": MODELS["8B width"], "lora": 16}


def ours(**fp8: Any) -> dict[str, Any]:
    return {"sections": {"fp8": FP8 | fp8}, "plugin": True}


ROWS: dict[str, dict[str, Any]] = {
    "bf16": {"plugin": False},
    "fp8": ours(),
    "fp8, frozen_weights": ours(frozen_weights="fp8"),
    "bf16, blocks compiled": {"plugin": False, "compiled": "blocks"},
    "fp8, fp8.compile": ours(compile=True),
    "fp8, frozen_weights, fp8.compile": ours(frozen_weights="fp8", compile=True),
    "fp8, current, fp8.compile": ours(recipe="current", compile=True),
}


def body(ledger: Ledger) -> None:
    rows: list[dict[str, Any]] = []
    for name, row in ROWS.items():
        if ledger.left() < 25:
            ledger.problem(name, f"{ledger.left():.0f} s of the budget are left")
            continue
        found = train(COMMON | row, min(ledger.left() - 5, 90))
        if "ms per step" not in found:
            ledger.problem(name, str(found))
            continue
        times = {one["run"]: one["ms per step"] for one in rows} | {name: found["ms per step"]}
        bases = ("bf16", "bf16, blocks compiled")
        ratios = {f"x {base}": round(times[base] / found["ms per step"], 3) if base in times else "" for base in bases}
        rows.append({"run": name, **found, **ratios, "losses": str(found["losses"])})
        ledger.record("LoRA of rank 16, 8B width", rows)


if __name__ == "__main__":
    main("lora", body)
