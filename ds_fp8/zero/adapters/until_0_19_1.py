"""0.19.1 and before: `step` flattens the gradients of a partition itself, and rounds them to the master's dtype.

Later releases ask `_get_preflattened_grad_partition` first, which is where the states mixin keeps the gradients as they
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..touched import touched

if TYPE_CHECKING:
    from .vocabulary import ZeroStage12 as Base
else:
    Base = object

TOUCHED = {
    "ZeroStage12": touched(
        overrides="_get_preflattened_grad_partition flatten_dense_tensors_aligned",
        reads="averaged_gradients flatten",
        writes="flatten",
    ),
}


class ZeroStage12(Base):
    """Over `DeepSpeedZeroOptimizer`."""

    def fp8_adapt(self) -> None:
        super().fp8_adapt()
        flatten = self.flatten
        self.flatten = lambda tensors: self._fp8_flatten(tensors, lambda: flatten(tensors))

    def flatten_dense_tensors_aligned(
        self, tensor_list: Any, alignment: Any, *arguments: Any, **options: Any
    ) -> Tensor:
        original = super().flatten_dense_tensors_aligned
        return self._fp8_flatten(tensor_list, lambda: original(tensor_list, alignment, *arguments, **options))

    def _get_preflattened_grad_partition(self, group_idx: int) -> Tensor | None:
        """Nothing is flat before the step."""
        return None

    def _fp8_flatten(self, tensors: Any, original: Callable[[], Tensor]) -> Tensor:
        """Ask the mixin when the gradients of a partition are to be flattened; everything else is not concerned."""
        index = next((index for index, group in self.averaged_gradients.items() if group is tensors), None)
        flat = None if index is None else self._get_preflattened_grad_partition(index)
        return original() if flat is None else flat
