"""Checks that all algorithms share: options that are refused by name, numbers, gradients.

Numbers (lr, betas, eps, weight_decay) and `bias_correction` (an option of DeepSpeed's Adam) act. `amsgrad` and
`maximize` would change the numbers and are refused; so are `capturable` and `differentiable`, which promise CUDA graphs
and gradients through the step. `foreach` and `fused` choose between torch's implementations of the same numbers; ours
is fused anyway, they have nothing left to choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..algorithms import REFUSED_OPTIONS
from ..errors import PlanError


def refuse_options(options: Mapping[str, Any], where: str) -> None:
    """Raise PlanError for the first option that is asked for and refused."""
    for name, reason in REFUSED_OPTIONS.items():
        if options.get(name):
            raise PlanError(f"{where}: {name} is not available with FP8 states ({reason}).\n  Remove {name}, or msamp.")


def check_numbers(numbers: Mapping[str, Any]) -> None:
    """torch's own ranges for the numbers of a parameter group; ValueError with the name and the value."""
    betas = numbers["betas"]
    if len(betas) != 2:
        raise ValueError(f"betas: {betas} are not two numbers")
    for index, beta in enumerate(betas):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"betas[{index}]: {beta} is not in [0, 1)")
    for name in ("lr", "eps", "weight_decay"):
        if name in numbers and not float(numbers[name]) >= 0.0:
            raise ValueError(f"{name}: {numbers[name]} is less than the minimum of 0")


def check_gradient(param: torch.Tensor, grad: torch.Tensor) -> None:
    """Raise PlanError for a gradient that the pass cannot read."""
    if grad.is_sparse:
        raise PlanError(
            f"a parameter of shape {tuple(param.shape)} has a sparse gradient: the optimizer needs all of it.\n"
            "  Build the embedding with sparse=False."
        )
    if grad.numel() != param.numel():
        raise PlanError(f"a gradient of {grad.numel()} elements for a parameter of {param.numel()}.")
    if grad.device != param.device:
        raise PlanError(f"a gradient on {grad.device} for a parameter on {param.device}.")
