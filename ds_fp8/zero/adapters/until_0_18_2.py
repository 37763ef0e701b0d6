"""0.18.2 and before: masters are fp32 whatever one asks for, and `engine.backward` calls the optimizer's `backward`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...numerics.dtypes import BASE_DTYPES

if TYPE_CHECKING:
    from ..states import ScaledStates as Base
else:
    Base = object


class _Fp32Masters(Base):
    def fp8_shrink_masters(self) -> None:
        """Masters that were built in fp32 shrink to the base dtype, as the same tensors: others hold on to them."""
        assert self.fp8_plan.optim is not None
        dtype = BASE_DTYPES[self.fp8_plan.optim.base_dtype]
        for master in self.fp8_masters:
            if master.dtype != dtype:
                gradient, master.grad = master.grad, None  # under offload DeepSpeed has made one already
                master.data = master.data.to(dtype)
                if gradient is not None:
                    master.grad = gradient.to(dtype)


class ZeroStage12(_Fp32Masters):
    """Over `DeepSpeedZeroOptimizer`."""


class ZeroStage3(_Fp32Masters):
    """Over `DeepSpeedZeroOptimizer_Stage3`."""


class Stage0:
    """Over our `Stage0Optimizer`."""

    def fp8_scale_losses(self, scaler: Any) -> None:
        """Our `backward` scales; a GradScaler would be asked to step as well."""
