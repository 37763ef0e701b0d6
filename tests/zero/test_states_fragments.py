"""`safe_get_full_fp32_param`, `safe_get_full_optimizer_state` and their setters, on quantized values.

With a master of 24 bits and states of 8, DeepSpeed's views would show half a weight and raw bytes. The getters must
give what the next step will compute with: the decoded master, which rounds to the model's own weight, and the decoded
moments. What a setter writes must come back within the format's half ulp, and the next step must start from it.
"""

from __future__ import annotations

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from ranks import run_ranks
from states_jobs import full_weights, job, train

from ds_fp8.formats import E4M3, FP16

pytestmark = pytest.mark.dist

CASES = {
    "stage1": {"stage": 1, "level": "O2"},
    "stage2": {"stage": 2, "level": "O2"},
    "stage3": {"stage": 3, "level": "O2"},
    "stage1-fp32-sums": {"stage": 1, "level": "O2", "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    # DeepSpeed 0.19.8 shows a neighbour's values here: its links follow another order than its flats.
    "stage2-round-robin": {"stage": 2, "level": "O2", "config": {"zero": {"round_robin_gradients": True}}},
    "stage2-offload": {
        "stage": 2,
        "level": "O2",
        "config": {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False},
    },
}


def visit(rank: int, world_size: int) -> dict[str, dict]:
    results = {}
    for name, case in CASES.items():
        engine = job(case)
        train(engine, range(2))
        params = list(engine.module.parameters())
        got = {
            "weights": full_weights(engine),
            "masters": torch.cat([safe_get_full_fp32_param(p).reshape(-1) for p in params]),
            "exp_avg": torch.cat([safe_get_full_optimizer_state(p, "exp_avg").reshape(-1) for p in params]),
            "exp_avg_sq": torch.cat([safe_get_full_optimizer_state(p, "exp_avg_sq").reshape(-1) for p in params]),
        }
        if case["stage"] == 3:
            got["local"] = safe_get_local_fp32_param(params[2]).dtype
        wide = params[2]
        value = torch.linspace(-1, 1, 61 * 37).view(61, 37)
        safe_set_full_fp32_param(wide, value)
        # The second moment first: an 8-bit exp_avg is kept as a ratio to its root.
        safe_set_full_optimizer_state(wide, value.square(), "exp_avg_sq")
        safe_set_full_optimizer_state(wide, value, "exp_avg")
        got |= {
            "set": value,
            "master after": safe_get_full_fp32_param(wide),
            "exp_avg after": safe_get_full_optimizer_state(wide, "exp_avg"),
            "exp_avg_sq after": safe_get_full_optimizer_state(wide, "exp_avg_sq"),
            "weights after": full_weights(engine)[13 * 37 + 37 :][: 61 * 37].view(61, 37),
            "bias untouched": torch.equal(
                safe_get_full_fp32_param(params[3]).reshape(-1), got["masters"][-61 * 5 - 61 * 3 : -61 * 5 - 61 * 2]
            ),
        }
        train(engine, range(2, 3))
        got["after a step"] = safe_get_full_fp32_param(wide)
        results[name] = got
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def results():
    return run_ranks(2, visit)


@pytest.mark.parametrize("name", CASES)
def test_getters_tell_the_truth(results, name):
    for of_rank in results:
        got = of_rank[name]
        # The model's weight is the master rounded to bf16, half up.
        assert torch.allclose(got["masters"], got["weights"], rtol=2**-8, atol=0)
        assert not torch.equal(got["masters"], got["weights"])
        assert got["exp_avg"].abs().sum() > 0
        assert (got["exp_avg_sq"] >= 0).all()
        assert got["exp_avg"].dtype == torch.float32
    for key in ("masters", "exp_avg", "exp_avg_sq"):
        assert torch.equal(results[0][name][key], results[1][name][key])


def test_all_stages_agree(results):
    """The same job in stages 1, 2 and 3 has the same masters up to where blocks of 128 begin."""
    first = results[0]["stage1"]["masters"]
    for name in ("stage2", "stage3", "stage2-offload"):
        assert torch.allclose(results[0][name]["masters"], first, atol=2e-2), name


@pytest.mark.parametrize("name", CASES)
def test_setters_are_kept(results, name):
    for of_rank in results:
        got = of_rank[name]
        value = got["set"]
        assert torch.allclose(got["master after"], value, rtol=2**-16, atol=0)
        assert torch.allclose(got["weights after"], value, rtol=2**-8, atol=0)
        # A block of 128 has one scale: relative error for large elements, a share of the block's amax for small ones.
        assert torch.allclose(got["exp_avg after"], value, rtol=E4M3.half_ulp, atol=2**-9 / E4M3.max)
        assert torch.allclose(got["exp_avg_sq after"], value.square(), rtol=2.5 * FP16.half_ulp, atol=2**-20)
        assert got["bias untouched"]
        # lr 1e-2, a second moment of about the first's square: one step moves a weight by about lr and decay.
        moved = (got["after a step"] - value).abs().max()
        assert 0 < moved < 5e-2
