"""Lion under ZeRO: DeepSpeed's `optimizer/type` "Lion" in every stage and level, and what a checkpoint of it is."""

from __future__ import annotations

import pytest
import states_jobs
import torch
from ranks import run_ranks

from tests.engine import engine_jobs
from tests.optim.test_scaled_lion import PlainLion

pytestmark = pytest.mark.dist

LION = {"type": "Lion", "params": {"lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.1}}
CASES = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (2, "fp16")]


def parity(rank: int, world_size: int) -> dict[tuple, tuple]:
    """Our Lion by DeepSpeed's section, and Lion written out as a client's optimizer of unmodified DeepSpeed."""
    found = {}
    for stage, dtype in CASES:
        ours = {"stage": stage, "dtype": dtype, "config": {"optimizer": LION}}
        theirs = {
            **ours,
            "config": {"zero_allow_untested_optimizer": True},
            "arguments": {"optimizer": PlainLion},
        }
        found[stage, dtype] = states_jobs.run_case(ours, True), states_jobs.run_case(theirs, False)
    return found


def test_o1_is_lion_under_deepspeed_to_the_bit():
    """Same bits in the weights, same norms: every wrapper, clipping on."""
    for of_rank in run_ranks(2, parity):
        for case, (ours, theirs) in of_rank.items():
            assert torch.equal(ours["weights"], theirs["weights"]), case
            assert ours["losses"] == theirs["losses"] and ours["norms"] == theirs["norms"], case


def journeys(rank: int, world_size: int, folder: str) -> dict[tuple, dict]:
    """By JSON, through activation: train, save, train on; and a second engine that resumes."""
    import deepspeed

    import ds_fp8

    ds_fp8.activate()
    found = {}
    # Stage 3 last: DeepSpeed replaces nn.functional.linear there for good, and the unconverted head rounds otherwise
    # then.
    for level, stage in (("O1", 2), ("O2", 0), ("O2", 1), ("O2", 2), ("O3", 1), ("O3", 2), ("O2", 3), ("O3", 3)):
        settings = engine_jobs.config(
            stage,
            optimizer={**LION, "params": {**LION["params"], "lr": 1e-3}},
            msamp={"enabled": True, "opt_level": level},
        )
        place = f"{folder}/{level}-{stage}"
        engine = engine_jobs.make_engine(settings)
        losses = engine_jobs.steps(engine, settings, rank, 0, 6)
        engine.save_checkpoint(place)
        rest = engine_jobs.steps(engine, settings, rank, 6, 10)
        parameter = next(engine.module.parameters())
        moment = deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg") if stage else None
        ours = getattr(engine.optimizer, "optimizer", None)
        held = {key for state in ours.state.values() for key in state if not isinstance(state[key], int)}
        engine.destroy()
        again = engine_jobs.make_engine(settings)
        again.load_checkpoint(place)
        resumed = engine_jobs.steps(again, settings, rank, 6, 10)
        again.destroy()
        other = engine_jobs.make_engine({**settings, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})
        refused = ""
        try:
            other.load_checkpoint(place)
        except Exception as error:  # noqa: BLE001  # the text is what is looked at
            refused = str(error)
        other.destroy()
        found[level, stage] = {
            "losses": losses + rest, "rest": rest, "resumed": resumed, "held": held, "refused": refused,
            "moment": moment is None or bool(moment.isfinite().all() and moment.abs().sum() > 0),
        }  # fmt: skip
    return found


@pytest.mark.slow
def test_every_stage_and_level_trains_and_resumes(tmp_path):
    """The loss falls, O3's are O2's to the digit, a resumed run's too; the one state is int8; Adam does not take it."""
    for of_rank in run_ranks(2, journeys, str(tmp_path), timeout_s=280):
        for case, found in of_rank.items():
            assert sum(found["losses"][-3:]) < sum(found["losses"][:3]), case
            assert found["resumed"] == found["rest"], case
            assert found["moment"], case
            assert not any("exp_avg_sq" in key for key in found["held"]), case
            assert ("exp_avg.data" in found["held"]) == (case[0] != "O1"), case
            assert "exp_avg_sq" in found["refused"], case
        for stage in (1, 2, 3):
            assert of_rank["O3", stage]["losses"] == of_rank["O2", stage]["losses"], stage
