"""A layer frozen in mid-run, and weights written in place: beside DeepSpeed alone."""

from __future__ import annotations

import math

import pytest
from ranks import run_ranks

from tests.engine.engine_jobs import config
from tests.zero.frozen_jobs import several

pytestmark = pytest.mark.dist

LEVELS = (None, "O1", "O2")


def settings(stage, level, **more):
    sections = {"fp8": {"enabled": False}, "msamp": {"enabled": True, "opt_level": level}} if level else {}
    return config(stage, **sections, **more)


def test_a_layer_frozen_in_mid_run_goes_on_by_momentum():
    """Without gradient it counts as gradient zero in every stage of DeepSpeed with 16-bit weights: at all levels
    too.
    """
    stages = (0, 1, 2)
    calls = [("frozen_in_mid_run", (settings(stage, level),)) for stage in stages for level in LEVELS]
    results = [found[0]["moved"] for found in run_ranks_by_call(calls)]
    for baseline, *ours in (results[at : at + 3] for at in range(0, len(results), 3)):
        assert baseline[3] > 0 and baseline[4] > 0, "DeepSpeed alone"
        for moved in ours:
            assert moved[3] == pytest.approx(baseline[3], rel=0.1) and moved[4] == pytest.approx(baseline[4], rel=0.1)


def test_a_weight_written_in_place_stays_written_with_msamp():
    """The 16-bit weight is half of its master, so zeros stay near zero; DeepSpeed's next step overwrites them from
    fp32.

    Zero beside the remainder of the old weight was NaN in one of two elements. Two steps of 1e-2 move a weight by 2e-2.
    """
    calls = [("written_in_place", (settings(stage, level),)) for stage in (0, 2) for level in LEVELS]
    results = run_ranks_by_call(calls)
    for baseline, *ours in (results[at : at + 3] for at in range(0, len(results), 3)):
        for rank in (0, 1):
            assert baseline[rank]["zeroed"] > 0.05, "overwritten"
            for found in ours:
                assert all(map(math.isfinite, found[rank]["losses"]))
                assert found[rank]["zeroed"] <= 0.02 < found[rank]["others"]


def run_ranks_by_call(calls):
    return list(zip(*run_ranks(2, several, calls)))
