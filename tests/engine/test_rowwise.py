"""Recipe `rowwise` under engines: trained in all stages and at the levels that it serves, refused where it does not."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from tests.engine.compile_jobs import several

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LEVELS = (None, "O1", "O2")


def test_rowwise_trains_in_all_stages():
    """Two ranks, gas 2, 12 steps: losses fall, are near those of `current`, and are not those: it really cast by
    rows.
    """
    calls = [(stage, level, "eager", "rowwise") for stage in (0, 1, 2, 3) for level in LEVELS]
    calls.append((2, None, "eager", "current"))
    results = run_ranks(2, several, calls, timeout_s=280)
    for found in results:
        *rowwise, (current, _) = found
        for call, (losses, _) in zip(calls, rowwise, strict=False):
            assert losses[-1] < losses[0], call
            assert losses != current, call
            assert sum(losses) == pytest.approx(sum(current), rel=0.1), call
