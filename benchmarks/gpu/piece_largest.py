"""The largest GPT that trains on the card: depth grows until memory ends, bf16 against O3 with expanded states.

Width 4096, micro-batch 1 x 1024, activation checkpointing, ZeRO-2 on one rank, three steps. Found by bisection over depth.
"""

from __future__ import annotations

from typing import Any

from jobs import SECTIONS, train
from ledger import Ledger, main

JOB = {
    "width": 4096,
    "vocabulary": 32768,
    "context": 1024,
    "micro_batch": 1,
    "gas": 1,
    "steps": 3,
    "stage": 2,
    "recompute": True,
}


def search(ledger: Ledger, name: str, low: int, high: int, share: float) -> dict[str, Any] | None:
    """Largest depth between `low` (taken to fit) and `high` (taken not to) that `share` seconds allow to find."""
    end = ledger.left() - share
    best = None
    while high - low > max(1, low // 20) and ledger.left() > max(end, 40):
        middle = (low + high) // 2
        found = train(JOB | {"depth": middle, "sections": SECTIONS[name]}, min(ledger.left(), 150))
        print(f"[largest] {name}, {middle} blocks: {found}", flush=True)
        if "ms per step" in found:
            low, best = middle, {"json": name, "blocks": middle, **found}
        elif "out of memory" in found:
            high = middle
        else:
            ledger.problem(f"{name}, {middle} blocks", str(found))
            return best
    return best


def body(ledger: Ledger) -> None:
    rows: list[dict[str, Any]] = []
    for name, low, high in (("bf16", 20, 60), ("O3 expanded + fp8", 36, 130)):
        best = search(ledger, name, low, high, ledger.left() / 2 if name == "bf16" else ledger.left())
        if best is None:
            continue
        best["x bf16"] = round(best["parameters"] / (rows[0]["parameters"] if rows else best["parameters"]), 2)
        rows.append(best)
        ledger.record("largest", rows)


if __name__ == "__main__":
    main("largest", body)
