"""An engine with our sections: swapped before DeepSpeed looks, told in one banner, refused alike on every rank."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run_ranks

from tests.engine.engine_jobs import (
    client_optimizer_job,
    config,
    pipeline_job,
    recompute_job,
    refused,
    resumed,
    train,
    zero_init_job,
)

FP8 = {"fp8": {"enabled": True, "amax_history_len": 4}}

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_json_alone_swaps_and_trains_in_every_stage(stage, dtype):
    """Four Linear in FP8, the head of 7 outputs kept with its reason, losses near those of the plain job.

    E4M3 rounds operands by at most 2^-4; two products in a row on top of a residual path move a mean square by far
    less than that, so 2^-4 relative is a safe bound and a swap that computes something else fails it.
    """
    plain = run_ranks(2, train, config(stage, dtype), False)
    found = run_ranks(2, train, config(stage, dtype, **FP8), True)
    assert "4 of 5 Linear -> Fp8Linear" in found[0]["said"] and "head" in found[0]["said"]
    assert found[1]["said"].count("ds_fp8:") == 0, "only rank 0 speaks"
    assert found[0]["digest"] == found[1]["digest"]
    for mine, theirs in zip(found, plain):
        assert mine["attached"] and mine["losses"] != theirs["losses"], "nothing was quantised"
        for ours, loss in zip(mine["losses"], theirs["losses"]):
            assert math.isclose(ours, loss, rel_tol=2**-4)
        assert all(torch.equal(found[0]["weights"][name], mine["weights"][name]) for name in mine["weights"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_with_loss_scaling(stage):
    """Gradients are multiplied by 2^8 before E5M2 sees them; the losses stay those of the plain job."""
    plain = run_ranks(2, train, config(stage, "fp16"), False)
    found = run_ranks(2, train, config(stage, "fp16", **FP8), True)
    assert found[0]["attached"]
    for ours, loss in zip(found[0]["losses"], plain[0]["losses"]):
        assert math.isclose(ours, loss, rel_tol=2**-4)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"fp8": {"enabled": True, "margn": 1}}, "did you mean 'margin'"),
        ({"FP8": {"enabled": True}}, "fp8"),
        ({"fp8": {"enabled": True, "layers": {"exclude": ["haed*"]}}}, "haed"),
        ({"fp8": {"enabled": True, "layers": {"include": ["head"]}}}, "head"),
        ({"fp8": {"enabled": True, "layers": {"exclude": ["blocks.*"]}}}, "nothing would compute in FP8"),
    ],
    ids=["typo", "section", "pattern", "unaligned", "nothing"],
)
def test_bad_input_stops_every_rank_with_the_reason(sections, told):
    """Both ranks raise before training; neither waits for the other."""
    errors = run_ranks(2, refused, [config(1, **sections)])
    assert all(told in error for error in errors), errors


def test_ranks_with_different_files_stop_each_other():
    """Rank 1 was given another margin: both hear who holds what."""
    one, other = ({"fp8": {"enabled": True, "margin": margin}} for margin in (0, 1))
    errors = run_ranks(2, refused, [config(1, **one), config(1, **other)])
    assert all("different plans" in error and "rank 1" in error for error in errors), errors


def test_an_error_on_one_rank_is_quoted_on_the_other():
    """Rank 1 has the typo; rank 0 names it."""
    errors = run_ranks(2, refused, [config(1, **FP8), config(1, fp8={"enabled": True, "margn": 1})])
    assert errors[0].startswith("PlanError") and "rank 1 stopped" in errors[0] and "margin" in errors[0]
    assert errors[1].startswith("ConfigError")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resume_is_exact_and_checkpoints_are_plain(stage, tmp_path):
    """Three steps, save, three more; a new engine loads and takes the same three: equal to the bit.

    The checkpoint's module is the plain model's, so a run without the plugin loads it strictly, and the plugin loads a
    checkpoint of a plain run, telling that scales start fresh.
    """
    for found in run_ranks(2, resumed, config(stage, **FP8), str(tmp_path)):
        assert found["resumed"] == found["uninterrupted"]
        assert found["client_state"] == {"note": 7}
        assert all(math.isfinite(loss) for loss in found["plain_from_ours"] + found["ours_from_plain"])
        assert found["module_keys"] == found["plain_keys"]
        if found["rank"] == 0:
            assert "amax histories start fresh" in found["said"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["optimizer", "groups", "generator"])
def test_parameters_handed_over_before_initialize_are_the_ones_trained(stage, form):
    """A client AdamW or its groups hold Parameter objects from before the swap; the new layers use the very same."""
    for found in run_ranks(2, client_optimizer_job, config(stage, **FP8), form):
        assert found["changed"] == found["all"]


def test_zero_init_parameters_are_swapped_while_empty():
    """zero.Init leaves every Parameter without data; layers must adopt, not copy."""
    for found in run_ranks(2, zero_init_job, config(3, **FP8)):
        assert found["swapped"] == 4 and found["losses"][-1] < found["losses"][0]


def test_activation_checkpointing_records_each_amax_once():
    """Recompute meets the scales of its own forward: same losses and scales as without checkpointing."""
    plain, torch_way, deepspeed_way = (
        run_ranks(2, recompute_job, config(1, **FP8), kind)[0] for kind in ("none", "torch", "deepspeed")
    )
    assert plain["losses"] == torch_way["losses"] == deepspeed_way["losses"]
    assert torch.equal(plain["scales"], torch_way["scales"]) and torch.equal(plain["scales"], deepspeed_way["scales"])


def test_pipeline_stages_swap_their_own_layers_and_train():
    """Two stages, three micro-batches in flight; `forward_funcs` run the new layers."""
    settings = config(0, gas=3, **FP8)
    for found in run_ranks(2, pipeline_job, settings, 4):
        assert found["swapped"] > 0 and found["losses"][-1] < found["losses"][0]
        assert found["scales_moved"]
