"""From JSON to loss: opt_level O3 beside O2 with everything else of the plugin on, stages 1 to 3."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.dist


def through_json(rank, world_size, stage, gas):
    import deepspeed
    from weights_jobs import Mixed, forward_loss

    import ds_fp8
    from ds_fp8.comm import counters

    ds_fp8.activate()
    rows = {}
    for level in ("O2", "O3"):
        torch.manual_seed(0)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": gas,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
            "steps_per_print": 10**9,
            "fp8": {"enabled": True, "backend": "torch"},
            "msamp": {"enabled": True, "opt_level": level},
        }
        engine, *_ = deepspeed.initialize(model=Mixed(), config=config)
        counters.reset()
        losses = []
        for step in range(4):
            for micro in range(gas):
                loss = forward_loss(engine, 10 * step + micro)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        rows[level] = (losses, counters.to_json(), type(engine.optimizer).__mro__[1].__name__)
        engine.destroy()
    return rows


@pytest.mark.parametrize(("stage", "gas"), [(1, 2), (2, 1), (3, 2)])
def test_o3_losses_are_o2s_losses(stage, gas):
    """States, masters, gradients and weights in FP8: the quantized values on the wire change no bit of any loss."""
    for rows in run_ranks(2, through_json, stage, gas):
        assert rows["O3"][0] == rows["O2"][0]
        assert rows["O3"][2].startswith("Weights")
        assert 0 < rows["O2"][1]["sent_bytes"]["gradient"] < 0.51 * rows["O2"][1]["deepspeed_bytes"]["gradient"]
        assert rows["O3"][1]["sent_bytes"]["weight"] > 0
