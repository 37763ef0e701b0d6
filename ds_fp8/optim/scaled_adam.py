"""ScaledAdam and ScaledAdamW: torch's Adam and AdamW with states and masters in 8 and 16 bits.

Example:

    optimizer = ScaledAdamW(model.parameters(), lr=3e-4, weight_decay=0.1, level="O2")
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


class ScaledAdam(ScaledOptimizer):
    """Adam: weight decay is an L2 term of the gradient, as in torch.optim.Adam. For the rest see ScaledOptimizer."""

    algorithm = "adam"
    moments = ALGORITHMS["adam"].moments
    decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        *,
        level: Level | str = "O2",
        base_dtype: str | None = None,
        seed: int = 0,
    ):
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, level=level, base_dtype=base_dtype, seed=seed)

    def step_flat(self, flat: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        exp_avg, exp_avg_sq = codecs.stored_moments(state, self.formats())
        assert exp_avg_sq is not None
        kernels.adam_step(
            kernels.AdamStep(
                param=flat,
                grad=grad,
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                master=masters.master_storage(state, self.level.master, flat),
                decoupled=self.decoupled,
                step=state["step"],
                grad_scale=self.grad_scale,
                torch_sqrt=self._promises_torch(flat),
                **self.rounding_of(state),
                **options,
            )
        )

    def _promises_torch(self, flat: torch.Tensor) -> bool:
        """States and master are fp32 to the last bit: then the step equals torch.optim.Adam's, to the last bit."""
        exact_states = self.level.exp_avg == self.level.exp_avg_sq == "fp32"
        return exact_states and masters.format_for(self.level.master, flat) in masters.EXACT_FORMATS


class ScaledAdamW(ScaledAdam):
    """AdamW: weight decay shrinks the weight directly, as in torch.optim.AdamW."""

    algorithm = "adamw"
    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bias_correction: bool = True,
        *,
        level: Level | str = "O2",
        base_dtype: str | None = None,
        seed: int = 0,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, bias_correction, level=level, base_dtype=base_dtype, seed=seed
        )
