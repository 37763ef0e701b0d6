"""Telemetry on a real engine: the numbers are those of the tensors, and looking changes nothing."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from ds_fp8.telemetry import read_jsonl_log
from tests.engine.engine_jobs import config, several

pytestmark = pytest.mark.dist


def test_every_second_step_is_written_down_and_no_bit_is_changed(tmp_path):
    """Steps 2 and 4 of four: all operands of the four FP8 layers, and the losses of a run that was not watched."""
    fp8 = {"enabled": True, "amax_history_len": 4}
    watched = {**fp8, "telemetry": {"enabled": True, "interval": 2, "path": str(tmp_path)}}
    calls = [("train", (config(2, fp8=fp8), True)), ("train", (config(2, fp8=watched), True))]
    run = run_ranks(2, several, calls)
    for quiet, seen in run:
        assert seen["losses"] == quiet["losses"]
    for rank in range(2):
        first, *events = read_jsonl_log(tmp_path / f"telemetry_rank{rank}.jsonl")
        assert first["event"] == "plan" and len(first["plan"]["modules"]) > 4
        steps = [event for event in events if event["event"] == "step"]
        assert [event["step"] for event in steps] == [2, 4]
        # Losses are those of engine.backward: steps 2 and 4 of `train`, this rank's.
        losses = run[rank][1]["losses"]
        assert [step["loss"] for step in steps] == [losses[1], losses[3]]
        for step in steps:
            statistics = step["readings"]
            assert {(found["role"], found["format"]) for found in statistics} == {
                ("input", "e4m3"),
                ("weight", "e4m3"),
                ("grad_output", "e5m2"),
            }
            assert len(statistics) == 4 * 3 and all(found["amax"] > 0 for found in statistics)
            assert 0 <= step["values"]["input/underflow_share"] < 1
        # A LayerNorm of 32 elements bounds its output by sqrt(32); after 4 steps it is near that of a normal sample.
        (up,) = [found for found in steps[0]["readings"] if found["fqn"] == "blocks.0.up" and found["role"] == "input"]
        assert 1.5 < up["amax"] < 32**0.5
