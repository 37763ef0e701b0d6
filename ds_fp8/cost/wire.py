"""What one rank sends per optimizer step and parameter, W ranks; each item times (W - 1) / W.

    gradients   DeepSpeed  stages 0 to 2: all-reduce of whole buckets, 2 b; stage 3: reduce-scatter, b
                FP8        stages 1 to 3: to the owners only, 1 byte and its share of a scale; stage 0: there and back
                           in stages 2 and 3 in each micro-batch, in 0 and 1 at the boundary
    weights     stages 1, 2: gathered once after the step; stage 3: for the forward and the backward of each
                micro-batch; b bytes, or 1 where they travel as FP8 data (O3)

What one node of R = W / N ranks sends to the N - 1 others (`network_gradient_bytes`, `network_weight_bytes`):

    rings       NCCL's reductions and gathers cross the border of a node once for each slice, whatever R is: as much as
                one rank sends
    inter_node  FP8 gradients, summed inside the node first: the slice of each rank to the N - 1 ranks of its place
    all         FP8 gradients of every rank to every rank of another node

Source: ZeRO (arXiv 1910.02054), section 7; counted by `comm.counters` and by the kernel (`benchmarks/bench_wire.py`).
"""

from __future__ import annotations

from dataclasses import replace

from ..formats import BLOCK_SIZE, FORMATS
from .memory import Placement

FP8_BYTES = 1 + 4 / BLOCK_SIZE
"""One FP8 value and its share of the fp32 scale of its block."""


def gradient_bytes(gradient_wire: str, where: Placement) -> float:
    """Bytes that one rank sends of one parameter's gradient; `gradient_wire` e4m3, e5m2 or none."""
    stage, micro = where.zero_stage, where.micro_batches if where.zero_stage >= 2 else 1
    if gradient_wire == "none":
        size = FORMATS[where.base].bytes * (1.0 if stage == 3 else 2.0)
    else:
        size = FP8_BYTES * (2 if stage == 0 else 1)
    return size * micro * _share(where)


def weight_bytes(weight_wire: str, where: Placement) -> float:
    """Bytes that one rank sends of one weight; `weight_wire` e4m3 or none."""
    size = 1.0 if weight_wire != "none" and where.zero_stage > 0 else FORMATS[where.base].bytes
    trips = {0: 0, 1: 1, 2: 1, 3: 2 * where.micro_batches}[where.zero_stage]
    return size * trips * _share(where)


def network_gradient_bytes(gradient_wire: str, scope: str, where: Placement) -> float:
    """Bytes that one node sends to the others of one parameter's gradient; `scope` as `gradient_wire_scope`, where
    `auto` is `inter_node` (GPUs with NVLink in each node).
    """
    if where.nodes == 1:
        return 0.0
    if gradient_wire == "none":
        return gradient_bytes(gradient_wire, where)
    if scope != "all":
        return gradient_bytes(gradient_wire, replace(where, world_size=where.nodes))
    in_node = where.world_size // where.nodes
    outside = (where.world_size - in_node) / (where.world_size - 1)
    return gradient_bytes(gradient_wire, where) * in_node * outside


def network_weight_bytes(weight_wire: str, where: Placement) -> float:
    """Bytes that one node sends to the others of one weight."""
    return weight_bytes(weight_wire, where) if where.nodes > 1 else 0.0


def _share(where: Placement) -> float:
    return (where.world_size - 1) / where.world_size
