"""Which Adam: torch's options, sorted into those that mean something here and those that are refused by name.

Numbers (lr, betas, eps, weight_decay) and `bias_correction` (an option of DeepSpeed's Adam) act. `amsgrad` and
`maximize` would change the numbers and are refused; so are `capturable` and `differentiable`, which promise CUDA graphs
and gradients through the step. `foreach` and `fused` choose between torch's implementations of the same numbers; ours
is fused anyway, they have nothing left to choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import PlanError

REFUSED = {
    "amsgrad": "it keeps a third state, the running maximum of exp_avg_sq",
    "maximize": "negate the loss instead",
    "capturable": "step and learning rate are read on the host",
    "differentiable": "states are updated in place, without a graph",
}
"""Options of torch's Adam that ours cannot do, and why."""


def refuse_options(options: Mapping[str, Any], where: str) -> None:
    """Raise PlanError for the first option that is asked for and refused."""
    for name, reason in REFUSED.items():
        if options.get(name):
            raise PlanError(f"{where}: {name} is not available with FP8 states ({reason}).\n  Remove {name}, or msamp.")


def check_numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """torch's own ranges; ValueError with the name and the value."""
    if not float(lr) >= 0.0:
        raise ValueError(f"lr: {lr} is less than the minimum of 0")
    if len(betas) != 2:
        raise ValueError(f"betas: {betas} are not two numbers")
    for index, beta in enumerate(betas):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"betas[{index}]: {beta} is not in [0, 1)")
    if not float(eps) >= 0.0:
        raise ValueError(f"eps: {eps} is less than the minimum of 0")
    if not float(weight_decay) >= 0.0:
        raise ValueError(f"weight_decay: {weight_decay} is less than the minimum of 0")


def step_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group as Python floats: schedulers may have put tensors there."""
    beta1, beta2 = group["betas"]
    return {
        "lr": float(group["lr"]),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
        "bias_correction": bool(group["bias_correction"]),
    }


def check_gradient(param: torch.Tensor, grad: torch.Tensor) -> None:
    """Raise PlanError for a gradient that the pass cannot read."""
    if grad.is_sparse:
        raise PlanError(
            f"a parameter of shape {tuple(param.shape)} has a sparse gradient: Adam needs all of it.\n"
            "  Build the embedding with sparse=False."
        )
    if grad.numel() != param.numel():
        raise PlanError(f"a gradient of {grad.numel()} elements for a parameter of {param.numel()}.")
    if grad.device != param.device:
        raise PlanError(f"a gradient on {grad.device} for a parameter on {param.device}.")
