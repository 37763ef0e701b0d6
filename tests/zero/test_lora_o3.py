"""LoRA at O3: a base that is frozen as a whole and kept in FP8."""

from __future__ import annotations

import frozen_stage3_jobs as jobs
import pytest
import torch
from ranks import run_ranks

FROZEN = 14
"""Linears of two decoder layers."""


@pytest.mark.dist
def test_the_base_travels_in_fp8_and_adapters_have_the_levels_states():
    """Adapters go in 16 bits at both levels, so O3 is O2 to the bit."""
    pytest.importorskip("peft")
    found = run_ranks(2, jobs.lora_by_level)
    assert "O3: the frozen base travels in FP8; no trained weight belongs to an FP8 layer" in found[0]["said"]
    assert "O3: the frozen base rests in FP8" in found[0]["said"], "ZeRO 2 gathers no weights of it"
    for of_rank in found:
        o2, o3 = of_rank["O2"], of_rank["O3"]
        assert o3["losses"] == o2["losses"] and o3["memory"] == o2["memory"] and o3["memory"]["chunks"] == FROZEN
        assert all(torch.equal(o3["weights"][name], value) for name, value in o2["weights"].items())
        losses = of_rank["O3, stage 2"]["losses"]
        assert losses == pytest.approx(o3["losses"], rel=0.01) and losses[0] == o3["losses"][0]
