"""What one rank keeps per parameter: the single model of memory, for `explain`, `estimate` and the documentation.

Bytes of one parameter on one rank, W ranks, b bytes of the base dtype (2 or 4); `/W` from the stage that shards it:

    stage         0        1           2        3
    weight        b        b           b        b/W
                           1 (O3)      1 (O3)   + 1/W (O3: its FP8 data beside the 16 bits)
                           1 (frozen, `frozen_weights`; stage 0 too)
    gradient      b        b, b/W*     b/W      b/W
    master        m        m/W         m/W      m/W
    exp_avg(_sq)  s        s/W         s/W      s/W
    cached weight c        c           c        0        (`weight_cache`: 1, and 1 more where a GPU keeps the transpose)

    m   4 for DeepSpeed's fp32 copy, which ZeRO makes of fp32 weights too (stage 0 does not); `extra_bytes` of a
        level, nothing beside an fp32 weight. At O3 in stages 1 and 2 the owner's weight itself (b) is part of it.
    *   stage 1 keeps whole gradients while it accumulates micro-batches, the partition when every backward is a
        boundary

`offload_optimizer` moves masters, states and the gradient partition to the host, the last as fp32 for DeepSpeed's own
optimizers; `offload_param` moves the weights of stage 3. Reduction buckets are counted apart (`bucket_bytes`).
Activations and what an allocator holds back are not in here.
Source: ZeRO (arXiv 1910.02054), section 3; measured in `benchmarks/bench_memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..formats import FORMATS
from ..levels import MASTERS, STATE_BYTES


@dataclass(frozen=True)
class Placement:
    """Where a job puts things.

    zero_stage         0 to 3
    world_size         ranks that share the states
    base               dtype of the weights: bf16, fp16 or fp32
    micro_batches      backward passes per optimizer step
    offload_optimizer  states, masters and gradients of the partition lie on the host
    offload_param      the weights of stage 3 lie on the host
    cached_weight      FP8 data that a layer keeps of its weight between forwards: 0, 1 (as it is), 2 (transposed too)
    nodes              nodes over which the ranks are spread evenly; it counts for the network alone
    """

    zero_stage: int
    world_size: int
    base: str = "bf16"
    micro_batches: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    cached_weight: int = 0
    nodes: int = 1


@dataclass(frozen=True)
class Bytes:
    """Bytes on one rank, by what they hold; on the device, or on the host."""

    weights: float = 0.0
    gradients: float = 0.0
    master: float = 0.0
    states: float = 0.0
    cached: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.master + self.states + self.cached

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, count: float) -> Bytes:
        """The bytes of `count` parameters like this one."""
        return Bytes(*(getattr(self, field.name) * count for field in fields(self)))


@dataclass(frozen=True)
class Kept:
    """What is kept of one parameter.

    exp_avg, exp_avg_sq, master  formats as in `levels`; "none" of a frozen parameter
    ours                         the states are ds_fp8's (`msamp`), not DeepSpeed's
    fp8_weight                   it travels as FP8 data (O3)
    is_multiplied                an FP8 layer multiplies with it
    is_fp8_alone                 frozen, and its FP8 data is all that is kept (`frozen_weights`; stages 0 to 2)
    """

    exp_avg: str
    exp_avg_sq: str
    master: str
    ours: bool
    fp8_weight: bool = False
    is_multiplied: bool = True
    is_fp8_alone: bool = False

    @property
    def is_frozen(self) -> bool:
        return self.master == "none"


def bytes_of(kept: Kept, where: Placement) -> tuple[Bytes, Bytes]:
    """(device, host) bytes of one parameter on one rank."""
    base, stage = FORMATS[where.base].bytes, where.zero_stage
    shard = 1 / where.world_size
    states_shard = shard if stage >= 1 else 1.0
    is_fp8_weight = (kept.fp8_weight and stage > 0) or kept.is_fp8_alone
    weights = base * (shard if stage == 3 else 1.0)
    if is_fp8_weight:
        weights = 1.0 if stage < 3 else weights + shard
    cached = where.cached_weight if kept.is_multiplied and stage < 3 else 0
    if is_fp8_weight and cached:
        cached -= 1  # what travels is what the layer multiplies with; only the transpose is more
    if kept.is_frozen:
        device = Bytes(weights=weights, cached=cached)
        return _moved(device, Bytes(), where)
    is_partitioned = stage >= 2 or (stage == 1 and where.micro_batches == 1)
    gradients = base * (shard if is_partitioned else 1.0)
    master = _master_bytes(kept, base, stage)
    if is_fp8_weight and stage < 3 and (where.base == "fp32" or MASTERS[kept.master].contains_weight):
        master += base
    states = STATE_BYTES[kept.exp_avg] + STATE_BYTES[kept.exp_avg_sq]
    device = Bytes(weights, gradients, master * states_shard, states * states_shard, cached)
    return _moved(device, Bytes(gradients=(base if kept.ours else 4.0) * shard), where)


def _master_bytes(kept: Kept, base: int, stage: int) -> float:
    if base == 4:
        return 0.0 if kept.ours or stage == 0 else 4.0
    return MASTERS[kept.master].extra_bytes


def _moved(device: Bytes, host_gradients: Bytes, where: Placement) -> tuple[Bytes, Bytes]:
    """Split into device and host by what is offloaded."""
    host = Bytes()
    if where.offload_optimizer and where.zero_stage >= 1:
        host = host + Bytes(gradients=host_gradients.gradients, master=device.master, states=device.states)
        kept_gradients = device.gradients if where.zero_stage == 1 and where.micro_batches > 1 else 0.0
        device = Bytes(device.weights, kept_gradients, 0.0, 0.0, device.cached)
    if where.offload_param and where.zero_stage == 3:
        host = host + Bytes(weights=device.weights)
        device = Bytes(0.0, device.gradients, device.master, device.states, device.cached)
    return device, host


def bucket_bytes(where: Placement, reduce_bucket_size: float, params: float) -> float:
    """Bytes of DeepSpeed's contiguous reduction bucket on the device, which stage 3 keeps between steps."""
    return min(reduce_bucket_size, params) * FORMATS[where.base].bytes if where.zero_stage == 3 else 0.0
