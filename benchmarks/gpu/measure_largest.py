"""The largest GPT that trains on the card: depth grows until memory ends, bf16 against O3 with expanded states.

Width 4096, micro-batch 1 x 1024, activation checkpointing, ZeRO-2 on one rank, three steps. Memory grows by the same
amount with every block, so two runs that fit foretell the depth at which it ends, and only a few more are needed.
One rank holds whole partitions: of O3, the 16-bit partition beside the quantized values, which shrinks with every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs import SECTIONS, train
from ledger import Ledger, main

EXPANDED = {"exp_avg": "e4m3_expanded", "exp_avg_sq": "e4m3_expanded"}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "O3 expanded + fp8": SECTIONS["O3 expanded + fp8"],
    "O2 expanded + fp8": {
        "fp8": SECTIONS["O2 + fp8"]["fp8"],
        "msamp": {"enabled": True, "opt_level": "O2", **EXPANDED},
    },
}
JOB: dict[str, Any] = {
    "width": 4096,
    "vocabulary": 32768,
    "context": 1024,
    "micro_batch": 1,
    "gas": 1,
    "steps": 3,
    "stage": 2,
    "recompute": True,
}
FIRST = 8, 16
"""Depths of the first two runs, which fit any card with FP8."""

MARGIN_GB = 1.5
"""Left free in the forecast: fragments, the driver's share."""

Run = Callable[[int], dict[str, Any]]


def search(run: Run, capacity_gb: float, left: Callable[[], float]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """(the result of the deepest run that fits, what went wrong), closing in on the border by forecast.

    run   result of a training at a depth: has `peak GB`, or `out of memory`, or neither when it failed
    left  seconds that remain
    """
    points: list[tuple[int, float]] = []
    best: dict[str, Any] | None = None
    low, high, back = 0, 10**6, 1
    middle = FIRST[0]
    while high - low > 1 and left() > 45:
        found = run(middle)
        if "peak GB" in found:
            low, best = middle, {"blocks": middle, **found}
            points.append((middle, found["peak GB"]))
        elif "out of memory" in found:
            high = middle
        else:
            return best, {f"{middle} blocks": str(found)}
        if len(points) < 2:
            middle = FIRST[1] if points else max(middle // 2, 1)
            continue
        (first, first_gb), (last, last_gb) = points[0], points[-1]
        forecast = last + int((capacity_gb - MARGIN_GB - last_gb) / max((last_gb - first_gb) / (last - first), 1e-3))
        if forecast >= high:  # too hopeful: back from the border in growing steps
            forecast, back = high - back, 2 * back
        middle = min(max(forecast, low + 1), high - 1)
    if best is not None:
        best["first that does not fit"] = high if high < 10**6 else "not looked for"
    return best, {}


def body(ledger: Ledger) -> None:
    import torch

    capacity = torch.cuda.get_device_properties(0).total_memory / 1e9
    ledger.record("card, GB", round(capacity, 1))
    rows: list[dict[str, Any]] = []
    for number, (name, sections) in enumerate(CONFIGURATIONS.items()):
        reserved = ledger.left() * (1 - 1 / (len(CONFIGURATIONS) - number))

        def run(depth: int, name: str = name, sections: dict[str, Any] = sections) -> dict[str, Any]:
            found = train(JOB | {"depth": depth, "sections": sections}, max(min(ledger.left(), 150), 1))
            print(f"[largest] {name}, {depth} blocks: {found}", flush=True)
            return found

        best, problems = search(run, capacity, lambda reserved=reserved: ledger.left() - reserved)
        for where, text in problems.items():
            ledger.problem(f"{name}, {where}", text)
        if best is None:
            continue
        best["x bf16"] = round(best["parameters"] / (rows[0]["parameters"] if rows else best["parameters"]), 2)
        rows.append({"json": name, **best, "losses": str(best["losses"])})
        ledger.record("largest", rows)


if __name__ == "__main__":
    main("largest", body)
