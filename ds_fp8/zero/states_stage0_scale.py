"""The loss scale of stage 0: DeepSpeed's numbers, kept by us, because its classes for them change from release to
release.

Rule (DeepSpeed, `runtime/fp16/unfused_optimizer.py`): an overflow halves a dynamic scale, down to `min_loss_scale`;
`scale_window` steps without one double it. Only fp16 has a scale; for bf16 and fp32 it is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import INITIAL_LOSS_SCALE, MIN_LOSS_SCALE, SCALE_WINDOW

from ..numerics.dtypes import as_tensor
from .touched import touched

TOUCHED = {
    "Engine": touched(reads="dynamic_loss_scale dynamic_loss_scale_args initial_dynamic_scale loss_scale"),
}


@dataclass
class LossScale:
    """DeepSpeed's names: the engine reports `cur_scale`, checkpoints keep most of the others."""

    cur_scale: float = 1.0
    use_grad_scaling: bool = False
    dynamic_loss_scale: bool = False
    cur_iter: int = 0
    last_overflow_iter: int = -1
    scale_factor: float = 2.0
    scale_window: int = 1000
    min_loss_scale: float = 1.0

    @classmethod
    def of(cls, engine: Any, dtype: torch.dtype) -> LossScale:
        """What the engine's configuration says for weights of `dtype`."""
        if dtype != torch.float16:
            return cls()
        if not engine.dynamic_loss_scale():
            return cls(engine.loss_scale(), True)
        arguments = engine.dynamic_loss_scale_args()
        if arguments is None:
            return cls(engine.initial_dynamic_scale(), True, True)
        window, lowest = arguments[SCALE_WINDOW], arguments[MIN_LOSS_SCALE]
        return cls(arguments[INITIAL_LOSS_SCALE], True, True, scale_window=window, min_loss_scale=lowest)

    def combined(self, scaled_norm: Any, clip_grad: float) -> Any:
        """What gradients are divided by: the loss scale times the clip. `scaled_norm` is theirs, scaled."""
        if clip_grad > 0.0:
            clip = ((scaled_norm / self.cur_scale) + 1e-6) / clip_grad
            if clip > 1:
                return clip * self.cur_scale
        return self.cur_scale

    def update(self, *, overflow: bool) -> None:
        """After each step, taken or skipped."""
        if self.dynamic_loss_scale and overflow:
            self.cur_scale = max(self.cur_scale / self.scale_factor, self.min_loss_scale)
            self.last_overflow_iter = self.cur_iter
        elif self.dynamic_loss_scale:
            stable = self.cur_iter - self.last_overflow_iter - 1
            if stable > 0 and stable % self.scale_window == 0:
                self.cur_scale *= self.scale_factor
        self.cur_iter += 1


def is_invalid_norm(norm: Any) -> bool:
    """Whether a gradient norm, or DeepSpeed's -1 in its place, tells of gradients that are not finite."""
    norm = as_tensor(norm)
    return bool((~torch.isfinite(norm) | (norm < 0)).any())
