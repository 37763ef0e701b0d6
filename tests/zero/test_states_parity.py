"""With fp32 states and an exact master, our step *is* DeepSpeed's: every wrapper, bit for bit.

O1's `split32` is fp32, cut in two; clip and unscale are one product either way. So after some steps the weights of each
stage, base dtype, accumulation and offload must equal those of unmodified DeepSpeed with torch's AdamW, and so must the
gradient norms that it reports. Whatever differs is a mistake in how we meet ZeRO, not rounding.
"""

from __future__ import annotations

import pytest
import states_jobs
import torch
from ranks import run_ranks

pytestmark = pytest.mark.dist

OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "gas": 2}

CASES = {
    **{
        f"stage{stage}-{dtype}": {"stage": stage, "dtype": dtype}
        for stage in (1, 2, 3)
        for dtype in ("bf16", "fp16", "fp32")
    },
    **{f"stage{stage}-offload-gas2": {"stage": stage, "config": {**OFFLOAD, "gas": 2}} for stage in (1, 2, 3)},
    **{f"stage{stage}-fp32-sums": {"stage": stage, "config": FP32_SUMS} for stage in (1, 2, 3)},
    **{f"stage{stage}-no-clip": {"stage": stage, "config": {"clip": 0.0, "gas": 2}} for stage in (1, 2, 3)},
    "stage2-round-robin": {"stage": 2, "config": {"zero": {"round_robin_gradients": True}}},
    "stage2-aligned": {"stage": 2, "config": {"zero": {"parameter_alignment": True}}},
    "stage3-sub-groups": {"stage": 3, "config": {"zero": {"sub_group_size": 500}}},
    "stage3-whole-parameters": {"stage": 3, "config": {"zero": {"stage3_param_persistence_threshold": 10**6}}},
    "stage0-fp32": {"stage": 0, "dtype": "fp32"},
}


def work(rank: int, world_size: int) -> dict[str, tuple]:
    return {name: (states_jobs.run_case(case, True), states_jobs.run_case(case, False)) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results():
    return run_ranks(2, work)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_norms_are_deepspeeds(results, name):
    """Same bits in the weights, same numbers in the log, on both ranks."""
    for of_rank in results:
        ours, baseline = of_rank[name]
        assert torch.equal(ours["weights"], baseline["weights"])
        assert ours["losses"] == baseline["losses"]
        assert ours["norms"] == baseline["norms"]


def test_replicas_stay_equal(results):
    """After a step every rank holds the same 16-bit weights."""
    for name in CASES:
        assert torch.equal(results[0][name][0]["weights"], results[1][name][0]["weights"]), name


def overflow_work(rank: int, world_size: int) -> list[dict]:
    cases = [{"stage": stage, "dtype": "fp16"} for stage in (0, 1, 2, 3)] + [{"stage": stage} for stage in (0, 1, 2, 3)]
    return [{**states_jobs.run_case(case, True, overflow_at=1), "case": case} for case in cases]


def test_an_infinite_loss_skips_one_step_everywhere():
    """Step 1 overflows: it is skipped and counted, and training goes on with finite weights on all ranks."""
    for of_rank in run_ranks(2, overflow_work):
        for result in of_rank:
            assert result["skipped"] == 1, result["case"]
            assert result["weights"].isfinite().all(), result["case"]


def stage0_work(rank: int, world_size: int) -> dict[str, dict]:
    names = {"bf16": (0, "bf16"), "bf16-zero1": (1, "bf16"), "fp16": (0, "fp16"), "fp16-zero1": (1, "fp16")}
    return {
        name: states_jobs.run_case({"stage": stage, "dtype": dtype}, True) for name, (stage, dtype) in names.items()
    }


def test_stage_0_steps_like_stage_1():
    """Without ZeRO DeepSpeed's own 16-bit wrappers start at step 2 (a dry step at construction) and, in fp16, never
    scale the loss. Ours do neither: stage 0 gives the weights of stage 1 up to the order of the gradient sums.

    The norm is the unscaled one, as in every other stage.
    """
    for of_rank in run_ranks(2, stage0_work):
        for dtype, half_ulp in (("bf16", 2**-9), ("fp16", 2**-12)):
            one, zero = of_rank[f"{dtype}-zero1"], of_rank[dtype]
            # Four updates of at most lr = 1e-2 each: a weight may fall on the other side of a rounding.
            assert (one["weights"] - zero["weights"]).abs().max() <= 4 * (1e-2 * half_ulp + 2 * half_ulp)
            assert zero["norms"] == pytest.approx(one["norms"], rel=1e-3)
