"""0.19.7 and before: reduced gradients of ZeRO 1 and 2 go back into the bucket only, never straight into a
partition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..touched import touched

if TYPE_CHECKING:
    from .vocabulary import ZeroStage12 as Base
else:
    Base = object

TOUCHED = {
    "ZeroStage12": touched(
        overrides=(
            "_add_full_reduction_to_compact_grad_partition _add_to_grad_partition_buffer "
            "_buffered_reduce_fallback_preserving_fp32 _get_compact_grad_partition_slice allreduce_no_retain"
        ),
    ),
}


class ZeroStage12(Base):
    """Over `DeepSpeedZeroOptimizer`."""

    def allreduce_no_retain(self, *arguments: Any) -> None:
        """Without the last argument, the slices of partitions to add to."""
        super().allreduce_no_retain(*arguments[:-1])

    def _buffered_reduce_fallback_preserving_fp32(self, *arguments: Any) -> None:
        """Nobody calls it."""

    def _add_full_reduction_to_compact_grad_partition(self, *arguments: Any) -> None:
        """Nobody calls it."""

    def _add_to_grad_partition_buffer(self, output: Any, source: Any) -> None:
        """No slice, nothing to add to it."""

    def _get_compact_grad_partition_slice(self, *place: Any) -> None:
        """No such slice."""
