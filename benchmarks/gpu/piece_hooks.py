"""What our hooks cost a step in which they have nothing to do: no plugin, plugin without sections, sections disabled.

A small GPT, so that the host is the bottleneck and an overhead shows; the losses must be the same to the bit.
"""

from __future__ import annotations

from typing import Any

from jobs import train
from ledger import Ledger, main

JOB = {
    "depth": 8,
    "width": 1024,
    "vocabulary": 32768,
    "context": 1024,
    "micro_batch": 4,
    "gas": 1,
    "steps": 60,
    "stage": 2,
}
DISABLED = {"fp8": {"enabled": False}, "msamp": {"enabled": False}}


def body(ledger: Ledger) -> None:
    cases: dict[str, dict[str, Any]] = {
        "no plugin": {"plugin": False},
        "no sections": {},
        "disabled": {"sections": DISABLED},
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    losses: dict[str, list[float]] = {}
    for _ in range(3):
        for name, case in cases.items():
            if ledger.left() < 40:
                continue
            found = train(JOB | case, min(ledger.left(), 120))
            if "ms per step" not in found:
                ledger.problem(name, str(found))
                continue
            times[name].append(found["ms per step"])
            losses.setdefault(name, found["losses"])
    base = sorted(times["no plugin"] or [float("nan")])[len(times["no plugin"]) // 2]
    rows = []
    for name, found in times.items():
        if found:
            middle = sorted(found)[len(found) // 2]
            row = {
                "case": name,
                "ms per step": middle,
                "all": str(found),
                "over no plugin": f"{middle / base - 1:+.2%}",
            }
            rows.append(row | {"losses bit-equal": losses[name] == losses.get("no plugin")})
    ledger.record("steps", rows)


if __name__ == "__main__":
    main("hooks", body)
