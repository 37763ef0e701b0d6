"""DeepSpeed's `torch_autocast` section beside ours: fp32 parameters, 16-bit gradients on the wire, FP8 products.

DeepSpeed's flag of autocast is global to a process, so all jobs here have the section; they share two processes.
"""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from tests.engine.engine_jobs import config, several

pytestmark = pytest.mark.dist

LISTED = ["torch.nn.modules.linear.Linear", "torch.nn.modules.normalization.LayerNorm"]
FP8 = {"fp8": {"enabled": True, "amax_history_len": 4}}
EXACT = {"enabled": True, "opt_level": "O1", "gradient_wire": "none"}
"""O1 on an fp32 base without its wire: fp32 states and masters, so nothing is rounded that DeepSpeed does not round."""


def autocast(stage, dtype="bfloat16", modules=None, **sections):
    section = {"enabled": True, "dtype": dtype, **({"lower_precision_safe_modules": modules} if modules else {})}
    return config(stage, dtype="fp32", torch_autocast=section, **sections)


CASES = {
    **{
        (kind, stage): (autocast(stage, **sections), kind != "unmodified")
        for stage in range(4)
        for kind, sections in {
            "unmodified": {},
            "fp8": FP8,
            "exact": {"fp8": {"enabled": False}, "msamp": EXACT},
            "O2": {**FP8, "msamp": {"enabled": True, "opt_level": "O2"}},
        }.items()
    },
    ("unmodified", "norms"): (autocast(2, modules=LISTED), False),
    ("fp8", "norms"): (autocast(2, modules=LISTED, **FP8), True),
    ("unmodified", "fp16"): (autocast(3, "float16"), False),
    ("exact", "fp16"): (autocast(3, "float16", fp8={"enabled": False}, msamp=EXACT), True),
}


@pytest.fixture(scope="module")
def jobs():
    """What both ranks of every job say."""
    by_rank = run_ranks(2, several, [("autocast_job", (*case, 4)) for case in CASES.values()], timeout_s=280)
    return dict(zip(CASES, zip(*by_rank)))


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "norms"])
def test_swapped_layers_travel_in_the_dtype_that_deepspeed_chose(jobs, stage):
    """Linear weights in bf16 and norms in fp32, as without us; norms in bf16 too where the section lists them."""
    for baseline, ours in zip(jobs["unmodified", stage], jobs["fp8", stage]):
        assert ours["attached"] and not baseline["attached"]
        assert ours["comm_dtypes"] == baseline["comm_dtypes"] and ours["buckets"] == baseline["buckets"]
        assert ours["comm_dtypes"]["blocks.0.up.weight"] == "torch.bfloat16"
        norm = "torch.bfloat16" if stage == "norms" else "torch.float32"
        assert ours["comm_dtypes"]["blocks.0.norm.weight"] == norm


@pytest.mark.parametrize("kind", ["fp8", "O2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp8_trains_beside_autocast(jobs, stage, kind):
    """e4m3 keeps 3 bits of mantissa, so one rounding is at most 2^-4 of the value; O2's wire carries quantized values,
    fp8's none.
    """
    baseline, ours = jobs["unmodified", stage], jobs[kind, stage]
    for theirs, mine in zip(baseline, ours):
        assert mine["losses"] != theirs["losses"], "nothing was quantized"
        assert all(abs(a - b) <= 2**-4 * b for a, b in zip(mine["losses"], theirs["losses"]))
        assert (mine["codes"] > 0) == (kind == "O2")
    assert all(torch.equal(ours[0]["weights"][name], ours[1]["weights"][name]) for name in ours[0]["weights"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "fp16"])
def test_msamp_steps_as_deepspeed_does_under_autocast(jobs, stage):
    """With fp32 states and DeepSpeed's wire only the order of fp32 operations differs, also behind fp16's
    GradScaler.
    """
    for baseline, ours in zip(jobs["unmodified", stage], jobs["exact", stage]):
        assert ours["attached"]
        assert ours["losses"] == pytest.approx(baseline["losses"], rel=2**-18)
        assert ours["norm"] == (None if baseline["norm"] is None else pytest.approx(baseline["norm"], rel=2**-18))
