"""0.18.2 and before: masters are fp32 whatever one asks for, and `engine.backward` calls the optimizer's `backward`."""

from __future__ import annotations

from typing import Any

from ...numerics.dtypes import BASE_DTYPES


class _Fp32Masters:
    def fp8_shrink_masters(self: Any) -> None:
        """Masters that were built in fp32 shrink to the base dtype, as the same tensors: others hold on to them."""
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

    def fp8_scale_losses(self: Any, scaler: Any) -> None:
        """Our `backward` scales; a GradScaler would be asked to step as well."""
