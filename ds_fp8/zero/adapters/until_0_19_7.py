"""0.19.7 and before: reduced gradients of ZeRO 1 and 2 go back into the bucket only, never straight into a partition."""

from __future__ import annotations

from typing import Any


class ZeroStage12:
    """Over `DeepSpeedZeroOptimizer`."""

    def allreduce_no_retain(self: Any, *arguments: Any) -> None:
        """Without the last argument, the slices of partitions to add to."""
        super().allreduce_no_retain(*arguments[:-1])  # type: ignore[misc]

    def _get_compact_grad_partition_slice(self: Any, *place: Any) -> None:
        """No such slice."""
