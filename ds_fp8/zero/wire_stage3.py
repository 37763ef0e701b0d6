"""ZeRO 3: the reduce-scatter of gradients, in FP8.

ZeRO 3 cuts every parameter into W equal chunks (the last ones may be short or empty) and rank r keeps chunk r. Both of
DeepSpeed's ways, reduce_scatter_coalesced and the all-reduce of a contiguous bucket (reduce_scatter: false), need from
each rank only the chunks of the others and give it its own: one exchange, whatever the setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ..comm.cut import chunk_bounds, cut_each, together
from .touched import touched
from .wire import GradientWire, reduce_bucket

if TYPE_CHECKING:
    from .deepspeed_wrappers import ZeroStage3 as Base
else:
    Base = object

TOUCHED = {
    "Parameter": touched(reads="partition_numel"),
    "ZeroStage3": touched(
        overrides=(
            "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads "
            "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
        ),
        reads=(
            "_assert_same_partition_group _get_param_partition_group _gradient_averaging_world_size "
            "gradient_accumulation_dtype gradient_predivide_factor ipg_buckets postscale_gradients "
            "sequence_parallel_size"
        ),
    ),
}


class WireStage3(Base):
    """Mixin over `DeepSpeedZeroOptimizer_Stage3`; the names are Python's mangled private ones."""

    fp8_gradient_wire: GradientWire

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(  # noqa: N802  DeepSpeed's name
        self, params_to_reduce: Sequence[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """One chunk per parameter, without padding."""
        return self._fp8_scatter(params_to_reduce, [param.grad.view(-1) for param in params_to_reduce])

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads(  # noqa: N802  DeepSpeed's name
        self, buffer_to_reduce: Tensor, communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """reduce_scatter: false. The same chunks, each padded with zeros to the partition's size."""
        params = self.ipg_buckets[communication_data_type].params
        grads = buffer_to_reduce.split([param.grad.numel() for param in params])
        partitions = self._fp8_scatter(params, grads, float(self.sequence_parallel_size))
        for index, (param, partition) in enumerate(zip(params, partitions, strict=True)):
            missing = param.partition_numel() - partition.numel()
            if missing:
                partitions[index] = torch.nn.functional.pad(partition, (0, missing))
        return partitions

    def _fp8_scatter(
        self, params: Sequence[Any], grads: Sequence[Tensor], sequence_parallel_size: float = 1.0
    ) -> list[Tensor]:
        # DeepSpeed 0.19.8 corrects for sequence parallelism only where it all-reduces; we give what it gives.
        self._assert_same_partition_group(params)
        group = self._get_param_partition_group(params[0])
        world_size, rank = dist.get_world_size(group), dist.get_rank(group)
        numels = tuple(grad.numel() for grad in grads)
        # DeepSpeed fills a buffer with the gradients of a bucket as they come, and then sorts the parameters.
        bucket, starts = together(grads)
        cut = cut_each(numels, world_size, starts)
        average = self._fp8_mean_factor(params, world_size) * sequence_parallel_size
        own = torch.empty(cut.numels[rank], dtype=self.gradient_accumulation_dtype, device=grads[0].device)
        reduce_bucket(bucket, cut, self.fp8_gradient_wire, group, average=average, out=own)
        bounds = [chunk_bounds(numel, world_size)[rank] for numel in numels]
        return list(own.split([stop - start for start, stop in bounds]))

    def _fp8_mean_factor(self, params: Sequence[Any], world_size: int) -> float:
        """DeepSpeed's factor, predivide included; experts are averaged over the dense world size, not their own."""
        averaging_world_size = self._gradient_averaging_world_size(params, world_size)
        predivide = self.gradient_predivide_factor if self.postscale_gradients else 1.0
        # DeepSpeed divides by W inside its reduce-scatter *and* by the predivide factor, and multiplies the latter
        # back only when it differs from W (0.19.8, stage3.py): equal means divided twice. The same numbers are wanted.
        multiplied_back = predivide if predivide != world_size else 1.0
        return multiplied_back / (predivide * averaging_world_size)
