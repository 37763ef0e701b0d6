"""Engines with a compiled model: the losses of eager mode, one whole graph, and nothing compiled anew as training
goes on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

from ds_fp8.telemetry import read_jsonl_log
from tests.engine.compile_jobs import several

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CALLS = [(2, None, "delayed", 4), (1, "O3", "delayed", 1)]


def readings(folder: Path, rank: int) -> list[tuple[int, str, str, float, float, float]]:
    events = read_jsonl_log(folder / f"telemetry_rank{rank}.jsonl")
    return sorted(
        (event["step"], found["fqn"], found["role"], found["amax"], found["scale"], found["underflow"])
        for event in events
        for found in event.get("readings", [])
    )


def test_compiled_engines_train_as_eager_ones(tmp_path):
    """Two ranks, gas 2, `start_step` 1, 12 steps with an evaluation: equal losses and telemetry, whatever is compiled.

    `aot_eager` runs the compiled graph op by op, so that equal means equal. At O3 weights are released in the first
    step. Telemetry looks at every fourth step, after compilation; or at every step, while the graph is made too.
    """
    calls = [
        (stage, level, how, recipe, {"interval": interval, "path": str(tmp_path / f"{stage} {how}")})
        for stage, level, recipe, interval in CALLS
        for how in ("eager", "blocks", "engine.compile")
    ]
    results = run_ranks(2, several, calls, timeout_s=280)
    for found in results:
        for number in range(0, len(calls), 3):
            eager, *others = found[number : number + 3]
            assert eager[1]["graphs"] == 0
            for call, (losses, counted) in zip(calls[number + 1 :], others):
                assert losses == eager[0], call
                assert counted["graphs"] > 0 and counted["recompiled"] == 0 and counted["breaks"] == 0, (call, counted)
                assert counted["evaluated"] == 1, (
                    "one graph more, for all blocks, also where O3 has released their weights"
                )
    for rank in range(2):
        for stage, _, _, interval in CALLS:
            seen, *others = (
                readings(tmp_path / f"{stage} {how}", rank) for how in ("eager", "blocks", "engine.compile")
            )
            assert len(seen) == 12 // interval * 4 * 3
            assert others == [seen, seen]
            # With `interval` 1 also the first step in FP8, which has no history: it is cast with its own amax.
            used = [amax * scale / (57344 if role == "grad_output" else 448) for _, _, role, amax, scale, _ in seen]
            assert min(used) > 0.05 and max(used) < 8
