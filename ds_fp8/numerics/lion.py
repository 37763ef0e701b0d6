"""The update of Lion on fp32 tensors, operation by operation.

Scalars are Python doubles, rounded to fp32 once, when they meet a tensor. Elements, all fp32, each operation rounded by
itself but `fma(a, b, c)`, a * b + c rounded once:

    g = float(grad) * grad_scale
    w = w * (1 - lr * weight_decay)                 only if weight_decay != 0
    c = fma(1 - beta1, g, m * beta1)                between momentum and gradient; its sign is the whole update
    w = w - lr * sign(c)                            sign(0) = 0, sign(NaN) = NaN
    m = fma(1 - beta2, g, m * beta2)

Weight decay is decoupled, as in AdamW; there is no bias correction and no eps. Source: Lion (arXiv 2302.06675), program
1. DeepSpeed's kernels take copysign(lr, c) instead of lr * sign(c): there a weight whose gradients were all zero, a
word that never came up say, moves by lr in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LionScalars:
    """The numbers of one step, as Python doubles. decay  factor on the weight, 1.0 when unused."""

    lr: float
    beta1: float
    beta2: float
    decay: float

    @classmethod
    def at(cls, *, lr: float, beta1: float, beta2: float, weight_decay: float) -> LionScalars:
        return cls(lr, beta1, beta2, 1 - lr * weight_decay)


def update(weight: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, scalars: LionScalars) -> None:
    """One step in place on `weight` and `exp_avg`; `grad` fp32, scaled already, read only."""
    if scalars.decay != 1.0:
        weight.mul_(scalars.decay)
    between = (exp_avg * scalars.beta1).add_(grad, alpha=1 - scalars.beta1)
    direction = torch.where(between.isnan(), between, between.sign())
    weight.add_(direction, alpha=-scalars.lr)
    exp_avg.mul_(scalars.beta2).add_(grad, alpha=1 - scalars.beta2)
