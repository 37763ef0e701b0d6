"""0.19.2 and before: ZeRO 3 cuts every parameter over one group, and averages over that group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deepspeed import comm as dist

from ..touched import touched

if TYPE_CHECKING:
    from .vocabulary import ZeroStage3 as Base
else:
    Base = object

TOUCHED = {
    "ZeroStage3": touched(
        overrides=(
            "_assert_same_partition_group _get_param_partition_group _get_param_partition_rank "
            "_gradient_averaging_world_size"
        ),
        reads="dp_process_group",
    ),
}


class ZeroStage3(Base):
    """Over `DeepSpeedZeroOptimizer_Stage3`."""

    def _get_param_partition_group(self, param: Any) -> Any:
        return self.dp_process_group

    def _get_param_partition_rank(self, param: Any) -> int:
        return dist.get_rank(group=self.dp_process_group)

    def _assert_same_partition_group(self, params: Sequence[Any]) -> None:
        """There is one."""

    def _gradient_averaging_world_size(self, params: Sequence[Any], partition_world_size: int) -> int:
        return partition_world_size
