"""ScaledLion: Lion with its one state, and the master, in 8 and 16 bits.

exp_avg in eight bits is kept as it is, not as a ratio: there is no second moment to divide by. Its blocks of 128
elements share a scale, so an element below 1/254 of the block's largest reads as zero; then the sign of the update is
the gradient's.

Example:

    optimizer = ScaledLion(model.parameters(), lr=1e-4, weight_decay=1.0, level="O2")
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .. import kernels
from ..algorithms import ALGORITHMS
from ..levels import Level
from . import codecs, masters
from .scaled_optimizer import ScaledOptimizer


class ScaledLion(ScaledOptimizer):
    """Lion (numerics/lion.py), with the names and defaults of DeepSpeed's FusedLion. For the rest see
    ScaledOptimizer.
    """

    algorithm = "lion"
    moments = ALGORITHMS["lion"].moments

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        level: Level | str = "O2",
        base_dtype: str | None = None,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__(params, defaults, level=level, base_dtype=base_dtype, seed=seed)

    def step_flat(self, flat: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        exp_avg, _ = codecs.stored_moments(state, self.formats())
        kernels.lion_step(
            kernels.LionStep(
                param=flat,
                grad=grad,
                exp_avg=exp_avg,
                master=masters.master_storage(state, self.level.master, flat),
                step=state["step"],
                grad_scale=self.grad_scale,
                **self.rounding_of(state),
                **options,
            )
        )
