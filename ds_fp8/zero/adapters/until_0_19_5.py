"""0.19.5 and before: ZeRO 1 and 2 always average, so `average_tensor` always divides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deepspeed import comm as dist

from ..touched import touched

if TYPE_CHECKING:
    from .vocabulary import ZeroStage12 as Base
else:
    Base = object

TOUCHED = {
    "ZeroStage12": touched(reads="dp_process_group sequence_parallel_size", writes="sequence_parallel_size"),
}


class ZeroStage12(Base):
    """Over `DeepSpeedZeroOptimizer`."""

    gradient_average = True

    @contextmanager
    def fp8_undivided(self) -> Iterator[None]:
        """The divisor is world size / sequence parallel size: made one, which no element notices."""
        sequence_parallel_size = self.sequence_parallel_size
        self.sequence_parallel_size = dist.get_world_size(group=self.dp_process_group)
        try:
            yield
        finally:
            self.sequence_parallel_size = sequence_parallel_size
