"""DeepSpeed's pipeline engine: two stages of a model on two ranks, ZeRO 0 and 1, every base dtype it allows.

With O1 the weights are unmodified DeepSpeed's, bit for bit, wherever unmodified DeepSpeed is right itself. In fp16
without ZeRO it is not (it unscales gradients of a loss that it never scaled), so there ours is held against ZeRO 1.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from ranks import run_ranks
from states_jobs import ds_config, make_plan, states_for
from torch import nn

pytestmark = pytest.mark.dist

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES: dict[str, dict[str, Any]] = {
    **{f"stage{stage}-{dtype}": {"stage": stage, "dtype": dtype} for stage in (0, 1) for dtype in DTYPES},
    "stage1-bf16-fp32-sums": {"stage": 1, "dtype": "bf16", "config": FP32_SUMS},
    "stage0-bf16-at-once": {"stage": 0, "dtype": "bf16", "config": {"bf16": {"immediate_grad_update": True}}},
}
STEPS, MICRO_BATCHES = 3, 2


def pipeline() -> PipelineModule:
    torch.manual_seed(0)
    layers = [LayerSpec(nn.Linear, 13, 37), nn.ReLU(), LayerSpec(nn.Linear, 37, 61), nn.ReLU(), nn.Linear(61, 5)]
    return PipelineModule(
        layers=layers, num_stages=2, loss_fn=lambda out, y: (out - y).float().pow(2).mean(), partition_method="uniform"
    )


def run(case: dict[str, Any], level: str | None) -> dict[str, Any]:
    """Train one pipeline; `level` None is DeepSpeed alone. Losses and norms are the same on both ranks."""
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    dtype = case["dtype"]
    extra = dict(case.get("config", {}))
    section = extra.pop(dtype, {})
    config = ds_config(case["stage"], dtype, gas=MICRO_BATCHES, **extra)
    if section:
        config[dtype] |= section
    plan = None if level is None else make_plan(level, dtype=dtype, stage=case["stage"])
    with states_for(plan):
        engine = deepspeed.initialize(model=pipeline(), config=config)[0]
    losses, norms = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        draw = [
            (torch.randn(4, 13, generator=generator), torch.randn(4, 5, generator=generator))
            for _ in range(MICRO_BATCHES)
        ]
        batches = iter([(x.to(DTYPES[dtype]), y.to(DTYPES[dtype])) for x, y in draw])
        losses.append(float(engine.train_batch(data_iter=batches)))
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    weights = torch.cat([param.detach().float().reshape(-1) for param in engine.module.parameters()])
    result = {"losses": losses, "norms": norms, "weights": weights, "wrapper": type(engine.optimizer).__name__}
    engine.destroy()
    return result


def work(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    results = {}
    for name, case in CASES.items():
        results[name] = {"O1": run(case, "O1"), "O2": run(case, "O2"), "unmodified": run(case, None)}
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def results():
    return run_ranks(2, work, timeout_s=500)


@pytest.mark.parametrize("name", [name for name in CASES if name != "stage0-fp16"])
def test_o1_is_deepspeeds_pipeline(results, name):
    for of_rank in results:
        ours, baseline = of_rank[name]["O1"], of_rank[name]["unmodified"]
        assert ours["losses"] == baseline["losses"]
        assert ours["norms"] == baseline["norms"]
        assert torch.equal(ours["weights"], baseline["weights"])


def test_fp16_without_zero_steps_like_zero_1(results):
    for of_rank in results:
        zero, one = of_rank["stage0-fp16"]["O1"], of_rank["stage1-fp16"]["O1"]
        assert zero["losses"] == pytest.approx(one["losses"], rel=1e-3)
        assert zero["norms"] == pytest.approx(one["norms"], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_o2_follows_o1(results, name):
    """Three steps of at most 1e-2: states in 8 and 16 bits move a weight by a part of that."""
    for of_rank in results:
        exact, quantized = of_rank[name]["O1"], of_rank[name]["O2"]
        assert quantized["losses"] == pytest.approx(exact["losses"], rel=0.05)
        assert 0 < (quantized["weights"] - exact["weights"]).abs().max() < 1e-2
