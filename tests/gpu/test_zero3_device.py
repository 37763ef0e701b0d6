"""Weights that lie as FP8 data, on the device: released (O3), frozen, gathered, compiled. One rank over NCCL.

Reads and writes of a released weight pass through a tensor subclass, and streams, caching allocator and compiler ask
such a tensor for more than a CPU does.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_training_device import FP8, make_engine, one_rank, train  # noqa: F401  a fixture

OURS = FP8 | {"backend": "torch"}


def level(name: str, **fp8) -> dict:
    return {"fp8": OURS | fp8, "msamp": {"enabled": True, "opt_level": name}}


def trained(stage: int, **sections) -> list[float]:
    engine = make_engine(stage, **sections)
    losses = train(engine)
    engine.destroy()
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_o3_gives_o2s_losses(stage):
    """A weight is cast from the same 16 bits by the same scale, whoever casts it."""
    assert trained(stage, **level("O3")) == trained(stage, **level("O2"))


@pytest.mark.parametrize("stage", [1, 2])
def test_released_weights_train_with_compiled_blocks(stage):
    compiled = trained(stage, **level("O3", compile={"regional": True}))
    assert compiled == pytest.approx(trained(stage, **level("O3")), rel=0.05)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_weights_kept_as_fp8_data_give_the_losses_of_16_bit_ones(stage):
    """Blocks frozen, the head trained; streams are told of what a step reads."""
    losses = []
    for how in ({}, {"frozen_weights": "fp8"}):
        engine = make_engine(stage, trained=lambda net: net.head.parameters(), fp8=OURS | how)
        losses.append(train(engine))
        for parameter in engine.module.parameters():
            parameter.record_stream(torch.cuda.current_stream())
        engine.destroy()
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("name", ["fp8", "O3"])
def test_a_compiled_zero3_engine_trains_as_an_eager_one(name):
    """`engine.compile()` with Inductor: DeepSpeed's hooks break graphs, layers and gathers give the same numbers."""
    sections = {"fp8": OURS} if name == "fp8" else level(name)
    engine = make_engine(3, **sections)
    engine.compile()
    losses = train(engine)
    engine.destroy()
    assert losses == pytest.approx(trained(3, **sections), rel=0.05)
