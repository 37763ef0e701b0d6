"""GPT of 1.25B parameters (22 x 2048, vocabulary 32768), ZeRO-2, micro-batch 8 x 2048, gas 2, by JSON alone.

Eager against eager, and compiled against compiled: bf16 under `engine.compile()`, ours by `fp8.compile`.
"""

from __future__ import annotations

from typing import Any

from jobs import FP8, SECTIONS, train
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


O2: dict[str, Any] = {"msamp": {"enabled": True, "opt_level": "O2"}}
COMPILED: dict[str, dict[str, Any]] = {
    "bf16, engine.compile": {"compiled": "engine", "plugin": False},
    "O2 + fp8, fp8.compile": {"sections": O2 | {"fp8": FP8 | {"compile": True}}},
    "O2 + fp8, fp8.compile, regional false": {"sections": O2 | {"fp8": FP8 | {"compile": {"regional": False}}}},
}


def body(ledger: Ledger) -> None:
    table(ledger, "training", {name: {"sections": sections} for name, sections in SECTIONS.items()})
    table(ledger, "training, compiled", COMPILED)


def table(ledger: Ledger, title: str, jobs: dict[str, dict[str, Any]]) -> None:
    """One training for each row; the first is the base."""
    rows: list[dict[str, Any]] = []
    base = 0.0
    for name, job in jobs.items():
        if ledger.left() < 45:
            ledger.problem(name, f"{ledger.left():.0f} s of the budget are left")
            continue
        found = train(JOB | job | {"steps_timed_apart": True}, min(ledger.left(), 150))
        if "ms per step" not in found:
            ledger.problem(name, str(found))
            continue
        base = base or found["tokens per s"]
        losses = found.pop("losses")
        rows.append(
            {"json": name, **found, "x first": round(found["tokens per s"] / base, 3), "last losses": str(losses)}
        )
        ledger.record(title, rows)


if __name__ == "__main__":
    main("gpt", body)
