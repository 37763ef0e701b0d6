"""Norm and overflow check of all gradients on a GPU in a few launches instead of fifteen for every parameter.

DeepSpeed looks at each gradient by itself: inf and NaN by minimum, maximum and two comparisons, the norm by a copy in
fp64. For 268 parameters these are 4000 launches, 40 ms of host time in a step whose memory traffic takes 5. One
multi-tensor norm in fp64 answers both questions: it is finite if and only if every element is (a 16-bit or fp32 element
squared fits fp64 well). DeepSpeed's own methods still do the reductions over ranks and model-parallel groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .touched import touched

if TYPE_CHECKING:
    from .deepspeed_wrappers import Partitioned, ZeroStage12
else:
    Partitioned = ZeroStage12 = object

TOUCHED = {
    "ZeroStage12 ZeroStage3": touched(overrides="get_grad_norm_direct"),
    "Parameter": touched(reads="_zero_padding"),
    "ZeroStage12": touched(overrides="has_overflow_partitioned_grads_serial", reads="averaged_gradients"),
}


def norms_of(gradients: list[Tensor]) -> Tensor:
    """fp64 [n]: the 2-norm of each gradient, accumulated in fp64."""
    return torch.stack(torch._foreach_norm([gradient.detach() for gradient in gradients], 2, dtype=torch.float64))


def on_gpu(gradients: list[Tensor]) -> bool:
    """Whether there are any and one multi-tensor norm takes them all."""
    return bool(gradients) and all(gradient.is_cuda and gradient.numel() for gradient in gradients)


def _counts_apart(param: Any) -> bool:
    """Parameters of which DeepSpeed adds some on one rank only: replicas of a pipeline, slices of tensor
    parallelism.
    """
    return any(
        getattr(param, name, False) for name in ("ds_pipe_replicated", "model_parallel", "tensor_model_parallel")
    )


class FusedGradNorm(Partitioned):
    """Mixin over DeepSpeed's ZeRO optimizers of every stage; on other devices the norm stays DeepSpeed's."""

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> Any:
        kept = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        if norm_type != 2 or any(map(_counts_apart, params)) or not on_gpu(kept):
            return super().get_grad_norm_direct(gradients, params, norm_type)
        # The norm of the norms is the norm: one "gradient" goes through DeepSpeed's own arithmetic and reductions.
        return super().get_grad_norm_direct([norms_of(kept[: len(params)])], params[:1], norm_type)


class FusedGradNormAndOverflow(FusedGradNorm, ZeroStage12):
    """Mixin over `DeepSpeedZeroOptimizer`: its overflow check as well. Stage 3 checks its one flat buffer by itself."""

    def has_overflow_partitioned_grads_serial(self) -> Tensor:
        gradients = [
            g for group in self.averaged_gradients.values() for g in group or () if g is not None and g.numel()
        ]
        if not on_gpu(gradients):
            return super().has_overflow_partitioned_grads_serial()
        return norms_of(gradients).isfinite().all().logical_not().reshape(1)
