"""Parameters that ZeRO 3 keeps whole: one all-gather after the step, weights as DeepSpeed's own to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import states_jobs
import torch
from ranks import run_ranks

pytestmark = pytest.mark.dist

CASES: dict[str, dict[str, Any]] = {
    # All of them whole; only norms and biases; none.
    "all": {"stage3_param_persistence_threshold": 10**6},
    "some": {"stage3_param_persistence_threshold": 100},
    "none": {"stage3_param_persistence_threshold": 0},
    "offload": {"stage3_param_persistence_threshold": 10**6, "offload_optimizer": {"device": "cpu"}},
    "sub-groups": {"stage3_param_persistence_threshold": 10**6, "sub_group_size": 500},
}


def trained(rank: int, world_size: int) -> dict[str, Any]:
    """Each case with our gather, with messages of one parameter or few, and with DeepSpeed's gathers alone."""
    from deepspeed import comm as dist

    from ds_fp8.zero import persistent_parameters, states_stage3

    deepspeed_gather, asked = dist.all_gather_into_tensor, []

    def counted(*arguments: Any, **more: Any) -> Any:
        asked.append(arguments[1].numel())
        return deepspeed_gather(*arguments, **more)

    together, most = states_stage3.gather_together, persistent_parameters.MOST_NUMEL
    ways = {
        "ours": (together, most),
        "short messages": (together, 300),
        "DeepSpeed's": (lambda params, group: params, most),
    }
    found: dict[str, Any] = {}
    for name, zero in CASES.items():
        for way, (gather, limit) in ways.items():
            states_stage3.gather_together, persistent_parameters.MOST_NUMEL = gather, limit
            config = states_jobs.ds_config(3, zero=zero, zero_force_ds_cpu_optimizer=False)
            engine = states_jobs.make_engine(config, states_jobs.make_plan("O2", stage=3))
            run = states_jobs.train(engine, range(3))
            asked.clear()
            dist.all_gather_into_tensor = counted
            run |= states_jobs.train(engine, range(3, 4))
            dist.all_gather_into_tensor = deepspeed_gather
            aligned = all(p.data.data_ptr() % 16 == 0 for p in engine.module.parameters() if p.data.numel())
            found[name, way] = run["losses"], states_jobs.full_weights(engine), len(asked), aligned
            engine.destroy()
    states_stage3.gather_together, persistent_parameters.MOST_NUMEL = together, most
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_are_those_of_deepspeeds_own_gathers(world_size):
    """Seven parameters of odd sizes: shares end in padding, and with three ranks one is all padding."""
    results = run_ranks(world_size, trained)
    for found in results:
        for name in CASES:
            losses, weights, count, aligned = found[name, "ours"]
            assert aligned, name
            for way in ("short messages", "DeepSpeed's"):
                assert found[name, way][0] == losses, (name, way)
                assert torch.equal(found[name, way][1], weights), (name, way)
            assert torch.equal(weights, results[0][name, "ours"][1])
            if name == "all":
                # One message for all instead of one for each.
                assert found[name, "DeepSpeed's"][2] - count == 7 - 1
