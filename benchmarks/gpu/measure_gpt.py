"""GPT of 1.25B parameters (22 x 2048, vocabulary 32768), ZeRO-2, micro-batch 8 x 2048, gas 2, by JSON alone."""

from __future__ import annotations

from typing import Any

from jobs import SECTIONS, train
from ledger import Ledger, main

JOB = {
    "depth": 22,
    "width": 2048,
    "vocabulary": 32768,
    "context": 2048,
    "micro_batch": 8,
    "gas": 2,
    "steps": 12,
    "stage": 2,
}


def body(ledger: Ledger) -> None:
    rows: list[dict[str, Any]] = []
    base = 0.0
    for name, sections in SECTIONS.items():
        if ledger.left() < 45:
            ledger.problem(name, f"{ledger.left():.0f} s of the budget are left")
            continue
        found = train(JOB | {"sections": sections, "steps_timed_apart": True}, min(ledger.left(), 150))
        if "ms per step" not in found:
            ledger.problem(name, str(found))
            continue
        base = base or found["tokens per s"]
        losses = found.pop("losses")
        rows.append(
            {"json": name, **found, "x bf16": round(found["tokens per s"] / base, 3), "last losses": str(losses)}
        )
        ledger.record("training", rows)


if __name__ == "__main__":
    main("gpt", body)
