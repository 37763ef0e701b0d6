"""An engine with our sections: swapped before DeepSpeed looks, reported in one banner, refused alike on every rank."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run_ranks

from tests.engine.engine_jobs import config, several

FP8 = {"fp8": {"enabled": True, "amax_history_len": 4}}

pytestmark = pytest.mark.dist


def together(*calls):
    """Run jobs on two ranks; for each job its result on both."""
    return list(zip(*run_ranks(2, several, [(name, arguments) for name, *arguments in calls])))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_json_alone_swaps_and_trains_in_every_stage(stage):
    """Four Linear in FP8, the head of 7 outputs kept with its reason, losses near those of the unmodified job.

    bf16 and fp32 everywhere, fp16 where DeepSpeed scales its loss (stages 1 to 3). E4M3 rounds operands by at most
    2^-4; two products in a row on top of a residual path move a mean square by far less than that, so 2^-4 relative is
    a safe bound, and a swap that computes something else fails it.
    """
    dtypes = ["bf16", "fp32"] + (["fp16"] if stage else [])
    calls = []
    for dtype in dtypes:
        calls += [("train", config(stage, dtype), False), ("train", config(stage, dtype, **FP8), True)]
    results = together(*calls)
    for baseline, found in zip(results[::2], results[1::2]):
        assert "4 of 5 Linear -> Fp8Linear" in found[0]["said"] and "head" in found[0]["said"]
        assert found[1]["said"].count("ds_fp8:") == 0, "only rank 0 speaks"
        assert found[0]["digest"] == found[1]["digest"]
        assert all(torch.equal(found[0]["weights"][name], found[1]["weights"][name]) for name in found[0]["weights"])
        for mine, theirs in zip(found, baseline):
            assert mine["attached"] and mine["losses"] != theirs["losses"], "nothing was quantized"
            for ours, loss in zip(mine["losses"], theirs["losses"]):
                assert math.isclose(ours, loss, rel_tol=2**-4)


BAD = [
    ({"fp8": {"enabled": True, "margn": 1}}, "did you mean 'margin'"),
    ({"FP8": {"enabled": True}}, "fp8"),
    ({"fp8": {"enabled": True, "layers": {"exclude": ["haed*"]}}}, "haed"),
    ({"fp8": {"enabled": True, "layers": {"include": ["head"]}}}, "head"),
    ({"fp8": {"enabled": True, "layers": {"exclude": ["blocks.*"]}}}, "nothing would compute in FP8"),
]


def test_bad_input_stops_every_rank_with_the_reason():
    """A typo, a misspelt section, a pattern without a match, an unaligned layer asked for, nothing left to convert."""
    for errors, (_, shown) in zip(together(*(("refused", [config(1, **bad)]) for bad, _ in BAD)), BAD):
        assert all(shown in error for error in errors), errors


def test_ranks_that_disagree_stop_each_other():
    """Another learning rate, betas or clip on rank 1: named. Another margin on rank 1: both hear who holds what. A
    typo on rank 1: rank 0 quotes it.
    """
    one, other = (config(1, fp8={"enabled": True, "margin": margin}) for margin in (0, 1))
    typo = config(1, fp8={"enabled": True, "margn": 1})
    fast, clipped = config(1, **FP8), config(1, **FP8, gradient_clipping=2.0)
    fast["optimizer"]["params"].update(lr=3e-2, betas=[0.9, 0.95])
    calls = ([one, other], [one, typo], [config(1, **FP8), fast], [config(1, **FP8), clipped])
    different, quoted, rates, clips = together(*(("refused", call) for call in calls))
    assert all("optimizer/params/lr: 0.01 on rank 0; 0.03 on rank 1" in error for error in rates), rates
    assert all("betas" in error and "absent on rank 0" in error for error in rates), rates
    assert all("gradient_clipping: 1.0 on rank 0; 2.0 on rank 1" in error for error in clips), clips
    assert all("fp8/margin: 0 on rank 0; 1 on rank 1" in error for error in different), different
    assert all("different plans" in error and "rank 1" in error for error in different), different
    assert quoted[0].startswith("PlanError") and "rank 1 stopped" in quoted[0] and "margin" in quoted[0]
    assert quoted[1].startswith("ConfigError")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resume_is_exact_and_checkpoints_are_deepspeeds(stage, tmp_path):
    """Three steps, save, three more; a new engine loads and takes the same three: equal to the bit.

    The checkpoint's module is the unmodified model's, so a run without the plugin loads it strictly, and the plugin
    loads a checkpoint of an unmodified run, telling that scales start fresh.
    """
    (results,) = together(("resumed", config(stage, **FP8), str(tmp_path)))
    for found in results:
        assert found["resumed"] == found["uninterrupted"]
        assert found["client_state"] == {"note": 7}
        assert all(math.isfinite(loss) for loss in found["baseline_from_ours"] + found["ours_from_baseline"])
        assert found["module_keys"] == found["baseline_keys"]
        if found["rank"] == 0:
            assert "amax histories start fresh" in found["said"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_handed_over_before_initialize_are_the_ones_trained(stage):
    """A client AdamW, its groups or a generator hold Parameters from before the swap; the new layers use the very
    same.
    """
    forms = ("optimizer", "groups", "generator")
    for results in together(*(("client_optimizer_job", config(stage, **FP8), form) for form in forms)):
        assert all(found["changed"] == found["all"] for found in results)


def test_zero_init_parameters_are_swapped_while_empty():
    """zero.Init leaves every Parameter without data; layers must adopt, not copy."""
    (results,) = together(("zero_init_job", config(3, **FP8)))
    for found in results:
        assert found["swapped"] == 4 and found["losses"][-1] < found["losses"][0]


def test_activation_checkpointing_records_each_amax_once():
    """Recompute meets the scales of its own forward: same losses and scales as without checkpointing."""
    kinds = ("none", "torch", "deepspeed")
    baseline, *others = (found[0] for found in together(*(("recompute_job", config(1, **FP8), kind) for kind in kinds)))
    for other in others:
        assert other["losses"] == baseline["losses"] and torch.equal(other["scales"], baseline["scales"])


def test_pipeline_stages_swap_their_own_layers_and_train():
    """Two stages, three micro-batches in flight; `forward_funcs` run the new layers."""
    settings = config(0, gas=3, **FP8)
    (results,) = together(("pipeline_job", settings, 4))
    for found in results:
        assert found["swapped"] > 0 and found["losses"][-1] < found["losses"][0]
        assert found["scales_moved"]


def test_a_pattern_needs_a_match_in_one_pipeline_stage():
    """Layer 4 is in the second stage only, so excluding it is right on both; layer 5 is nowhere: both stop."""
    section = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 3}
    here, nowhere = (
        config(1, **section, fp8={"enabled": True, "layers": {"exclude": [pattern]}}) for pattern in ("4", "5")
    )
    good, bad = together(("pipeline_patterns", here), ("pipeline_patterns", nowhere))
    assert " ".join(good).split() == ["0", "2"]
    assert all("fp8/layers/exclude: '5' matches no Linear" in error for error in bad), bad
