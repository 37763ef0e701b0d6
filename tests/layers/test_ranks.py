"""FP8 layers on real ranks: amaxes reduced over the group, and the same numbers in every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

from tests.layers import rank_jobs

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def found() -> list[dict[Any, Any]]:
    """What each of two ranks found."""
    return run_ranks(2, rank_jobs.everything)


def test_reduce_amax_takes_the_maximum_over_the_ranks(found):
    """Inputs of size 1 and 2, gradients of 1 and 2: with reduction both ranks scale by 2, without each by its own."""
    together = [rank["amax", True] for rank in found]
    assert torch.equal(together[0]["scales"], together[1]["scales"])
    assert together[0]["scales"][0] == 448 / 2 and together[0]["scales"][2] == 57344 / 2
    alone = [rank["amax", False] for rank in found]
    assert [float(rank["scales"][0]) for rank in alone] == [448, 224]
    assert [float(rank["scales"][2]) for rank in alone] == [57344, 28672]


@pytest.mark.parametrize("kind", ["delayed", "current", "block"])
def test_zero_stages_compute_the_same_losses(found, kind):
    """Stages 1 and 3: weights that are gathered again for the backward give the same quantized values, bit for bit."""
    for rank in found:
        stage1, stage3 = rank[kind, 1], rank[kind, 3]
        assert stage1["losses"].isfinite().all()
        assert torch.equal(stage1["losses"][:2], stage3["losses"][:2])
        # Later ones follow gradients that each stage sums in its own order: within bf16's rounding.
        torch.testing.assert_close(stage1["losses"], stage3["losses"], rtol=2.0**-8, atol=0)
        assert not any(stage1["kept_quantized"]) and not any(stage3["kept_quantized"]), (
            "nobody keeps a quantized weight"
        )
        assert stage1["updates"] == stage3["updates"] == (3 if kind == "delayed" else 0), "once per step"
    assert torch.equal(found[0][kind, 3]["scales"], found[1][kind, 3]["scales"])


def test_zero_init_plans_and_trains(found):
    """Parameters that are empty until gathered: planned by their whole shape, adopted, trained."""
    jobs = [rank["zero.Init"] for rank in found]
    assert jobs[0]["digest"] == jobs[1]["digest"]
    assert jobs[0]["losses"].isfinite().all()
    assert jobs[0]["losses"][-2:].mean() < jobs[0]["losses"][:2].mean()


def test_a_pipeline_has_several_forwards_in_flight(found):
    """All micro-batches of a step share its scales: the same losses and scales with and without recompute."""
    for rank in found:
        baseline, recomputed = rank["pipeline", 0], rank["pipeline", 1]
        assert baseline["fp8"] and baseline["updates"] == recomputed["updates"] == 2
        assert baseline["losses"].isfinite().all() and baseline["losses"][1] < baseline["losses"][0]
        assert torch.equal(baseline["losses"], recomputed["losses"])
        assert torch.equal(baseline["scales"], recomputed["scales"])
