"""Bytes, from the table of levels: what a rank keeps and what it sends, without a model.

Per parameter, W ranks, ZeRO stage s; `/W` applies from the stage that shards the item (docs/numerics.md, 4):

    weight      2 (bf16, fp16) or 4      /W at stage 3; 1 at O3, where the layers' codes replace it
    gradient    as the weight            /W from stage 2
    master      beside the weight        /W from stage 1; at O3 plus the owner's own weight, which a split master completes
    exp_avg(_sq) by codec                /W from stage 1

Sent per optimizer step by each rank, each item times (W - 1) / W and times the micro-batches in which it is sent:

    gradients   DeepSpeed  stages 0-2: all-reduce, 2 x 16 bit; stage 3: reduce-scatter, 1 x 16 bit
                FP8 wire   stages 1-3: to the owners only, 1 byte and its share of a scale; stage 0: and back, twice
    weights     stages 1, 2: gathered once after the step; stage 3: for forward and for backward of each micro-batch

Activations, buffers and what the allocator keeps are not in here. O3 counts every parameter as owned by an FP8 layer.
Source: ZeRO (arXiv 1910.02054), section 3 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import BLOCK_SIZE, FORMATS
from ..levels import LEVELS, MASTER_EXTRA_BYTES, STATE_BYTES, Level

STAGES = (0, 1, 2, 3)
CODE_BYTES = 1 + 4 / BLOCK_SIZE
"""One FP8 code and its share of the fp32 scale of its block."""


@dataclass(frozen=True)
class Job:
    """The numbers that bytes depend on; base is the format of the weights, gas the micro-batches per step."""

    params: int
    world_size: int
    gas: int = 1
    base: str = "bf16"

    @property
    def base_bytes(self) -> int:
        return FORMATS[self.base].bytes


AMP = Level("AMP", exp_avg="fp32", exp_avg_sq="fp32", master="fp32", gradient_wire="none")
"""DeepSpeed's mixed precision, and `fp8` alone: FP8 products change neither states nor wire."""

ROWS = {"AMP": AMP, "fp8": AMP, **LEVELS}


def is_possible(level: Level, stage: int) -> bool:
    """FP8 weights need ZeRO."""
    return level.weight_wire == "none" or stage > 0


def resident_bytes(level: Level, stage: int, job: Job) -> float:
    """Bytes that one rank keeps for weights, gradients, masters and states."""
    shard = 1 / job.world_size
    base = job.base_bytes
    is_coded = level.weight_wire != "none" and stage > 0
    weight = (1.0 if is_coded else base) * (shard if stage == 3 else 1.0)
    gradient = base * (shard if stage >= 2 else 1.0)
    own_weight = base if is_coded and (job.base == "fp32" or level.master.startswith("split")) else 0
    states = master_bytes(level, job) + own_weight + STATE_BYTES[level.exp_avg] + STATE_BYTES[level.exp_avg_sq]
    return job.params * (weight + gradient + states * (shard if stage >= 1 else 1.0))


def master_bytes(level: Level, job: Job) -> float:
    """Bytes of the master beside the weight. An fp32 weight is its own master; DeepSpeed's ZeRO copies it all the same."""
    if job.base == "fp32" and level.name != "AMP":
        return 0.0
    return MASTER_EXTRA_BYTES[level.master]


def sent_bytes(level: Level, stage: int, job: Job) -> tuple[float, float]:
    """(gradient bytes, weight bytes) that one rank sends per optimizer step."""
    share = job.params * (job.world_size - 1) / job.world_size
    micro = job.gas if stage >= 2 else 1  # stages 0 and 1 reduce at the boundary only
    if level.gradient_wire == "none":
        gradient = job.base_bytes * (1.0 if stage == 3 else 2.0)
    else:
        gradient = CODE_BYTES * (2 if stage == 0 else 1)
    weight = (1 if level.weight_wire != "none" else job.base_bytes) * {0: 0, 1: 1, 2: 1, 3: 2 * job.gas}[stage]
    return share * gradient * micro, share * weight
