"""Engines with a compiled model: the losses of eager mode, one whole graph, and nothing compiled anew as training goes on."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from tests.engine.compile_jobs import several

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CALLS = [(2, None, "delayed"), (1, "O3", "delayed")]


def test_compiled_engines_train_as_eager_ones():
    """Two ranks, gas 2, `start_step` 1, 12 steps with an evaluation: equal losses, whatever is compiled.

    `aot_eager` runs the compiled graph op by op, so that equal means equal. At O3 weights are released in the first step.
    """
    calls = [
        (stage, level, how, recipe) for stage, level, recipe in CALLS for how in ("eager", "blocks", "engine.compile")
    ]
    results = run_ranks(2, several, calls, timeout_s=280)
    for found in results:
        for number in range(0, len(calls), 3):
            eager, *others = found[number : number + 3]
            assert eager[1]["graphs"] == 0
            for call, (losses, counted) in zip(calls[number + 1 :], others):
                assert losses == eager[0], call
                assert counted["graphs"] > 0 and counted["recompiled"] == 0 and counted["breaks"] == 0, (call, counted)
