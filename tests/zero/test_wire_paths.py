"""The other paths of a gradient: BF16_Optimizer, experts, sparse embeddings, two-level groups, refusals."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from ranks import run_ranks

from ds_fp8.errors import PlanError
from ds_fp8.levels import LEVELS


def wires():
    from ds_fp8.comm import Wire
    from ds_fp8.formats import E4M3

    return None, Wire(None), Wire(E4M3)


def bf16_optimizer(rank, world_size):
    from wire_jobs import ds_config, train

    config = ds_config(stage=1, dtype="bf16", gas=2, extra={"data_types": {"grad_accum_dtype": "fp32"}})
    config["communication_data_type"] = "fp32"  # else DeepSpeed rounds its fp32 sums to bf16 on the way, and we do not
    config["bf16"]["immediate_grad_update"] = True
    return [train(config, wire) for wire in wires()]


class Experts(torch.nn.Module):
    """A layer for all ranks, and DeepSpeed's mixture of two experts over two of them."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.shared = torch.nn.Linear(13, 24)
        self.mixture = MoE(24, torch.nn.Linear(24, 24), num_experts=2, ep_size=2, k=1)
        self.head = torch.nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.mixture(torch.relu(self.shared(x)))[0])


def experts(rank, world_size, stage):
    """ep_size 2 on four ranks: experts are shared by two ranks each, everything else by all four."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from wire_jobs import batch, ds_config, put_on_wire

    found = []
    for wire in wires():
        torch.manual_seed(0)
        model = Experts()
        params = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
        config = ds_config(stage=stage)
        config.pop("optimizer")
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(params, lr=1e-2), config=config)
        put_on_wire(engine, wire)
        for step in range(3):
            x, y = batch(step, 0, rank, torch.float32)
            engine.backward((engine(x) - y).pow(2).mean())
            engine.step()
        found.append(torch.cat([param.detach().reshape(-1).clone() for param in model.parameters()]))
        engine.destroy()
    return found


def sparse(rank, world_size):
    import deepspeed
    from wire_jobs import ds_config, put_on_wire

    found = []
    for wire in wires():
        torch.manual_seed(0)
        model = torch.nn.EmbeddingBag(50, 8, mode="sum", sparse=True)
        config = ds_config(stage=0)
        config.pop("optimizer")
        config.pop("gradient_clipping")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        put_on_wire(engine, wire)
        engine.backward(engine(torch.tensor([[rank, 7], [3, rank + 20]])).sum())
        engine.step()
        found.append(model.weight.detach().clone())
        engine.destroy()
    return found


@pytest.mark.dist
def test_bf16_optimizer_reduces_in_fp8_and_all_ranks_agree():
    """grad_accum_dtype fp32 with bf16 and stage 1 is another optimizer, which all-reduces through the engine."""
    for baseline, uncast, fp8 in run_ranks(2, bf16_optimizer):
        assert torch.equal(baseline["weights"], uncast["weights"])
        assert not torch.equal(baseline["weights"], fp8["weights"])
        for a, b in zip(baseline["norms"], fp8["norms"], strict=True):
            assert a == pytest.approx(b, rel=0.05)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 2])
def test_experts_are_summed_over_their_own_group(stage):
    """Bit-equal without the cast: no expert's gradient may reach the other expert."""
    for baseline, uncast, fp8 in run_ranks(4, experts, stage):
        # Four ranks: a sum of four in another order, so equal to a few ulp of fp32, not to the bit.
        assert torch.allclose(baseline, uncast, atol=1e-4)
        assert not torch.equal(baseline, fp8)
        assert (baseline - fp8).norm() < 0.05 * baseline.norm()


@pytest.mark.dist
def test_sparse_gradients_are_left_as_they_are():
    for baseline, uncast, fp8 in run_ranks(2, sparse):
        assert torch.equal(baseline, uncast)
        assert torch.equal(baseline, fp8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_quantized_gradients", True),
        ("zero_quantized_weights", True),
        ("zero_quantized_nontrainable_weights", True),
        ("zero_hpz_partition_size", 2),
    ],
)
def test_deepspeeds_own_quantized_collectives_are_refused_by_name(key, value):
    """Two casts of the same bytes help nobody; the message names both keys and the way out."""
    from ds_fp8.zero.wire import refuse_conflicts

    with pytest.raises(PlanError, match=key):
        refuse_conflicts(DeepSpeedZeroConfig(**{"stage": 3, key: value}), LEVELS["O3"])
    refuse_conflicts(DeepSpeedZeroConfig(), LEVELS["O3"])
