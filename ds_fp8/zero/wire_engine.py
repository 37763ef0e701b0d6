"""Stage 0, BF16_Optimizer and the pipeline engine: `engine.allreduce_bucket` in FP8.

All three end in the engine's bucketed all-reduce, because every rank needs every gradient: DDP steps the whole model
everywhere, BF16_Optimizer takes the norm over all of its gradients on each rank. So here both halves are paid,
2 (W - 1) / W bytes per parameter, and all ranks end with the same bits.

Sparse gradients take another path (sparse_allreduce) and are left as they are: their indices must be exact, and they
are small. Tied weights of a pipeline are summed by the pipeline engine itself, in their own dtype.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

from deepspeed import comm as dist
from torch import Tensor

from ..comm import all_reduce, counters
from ..comm.counters import all_reduce_bytes
from .touched import touched
from .wire import GradientWire

TOUCHED = {
    "Engine": touched(reads="allreduce_bucket flatten gradient_average", writes="allreduce_bucket"),
}


def allreduce_bucket(self: Any, bucket: Sequence[Tensor], dp_group: Any, dp_world_size: float | None = None) -> Tensor:
    """DeepSpeed's method of the same name; `dp_world_size` is its divisor, not always the size of the group."""
    tensor: Tensor = self.flatten(bucket)
    if dp_world_size is None:
        dp_world_size = dist.get_world_size(group=dp_group)
    # Predivide, postscale or both: in an fp32 sum they are one factor.
    average = 1.0 / dp_world_size if self.gradient_average else 1.0
    gradient_wire: GradientWire = self._fp8_gradient_wire
    route = gradient_wire.route(dp_group)
    counters.add("gradient", 0, all_reduce_bytes(tensor.numel(), tensor.element_size(), route.world_size))
    return all_reduce(tensor, route, wire=gradient_wire.wire, average=average)


def install(engine: Any, gradient_wire: GradientWire) -> None:
    """Let this engine's all-reduces go in FP8."""
    engine._fp8_gradient_wire = gradient_wire
    engine.allreduce_bucket = types.MethodType(allreduce_bucket, engine)


def uninstall(engine: Any) -> None:
    """The class's own method again."""
    for name in ("allreduce_bucket", "_fp8_gradient_wire"):
        engine.__dict__.pop(name, None)
