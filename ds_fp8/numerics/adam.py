"""The update of Adam and AdamW on fp32 tensors, operation by operation as torch's, so that fp32 states stay bit-equal.

Scalars are Python doubles, made as torch makes them and rounded to fp32 once, when they meet a tensor:

    decay = 1 - lr * weight_decay                   (AdamW)
    bias_correction1 = 1 - beta1 ** step            (1 if switched off)
    bias_correction2_sqrt = (1 - beta2 ** step) ** 0.5   (the same)
    step_size = -(lr / bias_correction1)

Elements, all fp32. `fma(a, b, c)` is a * b + c rounded once; every other operation is rounded by itself:

    g = float(grad) * grad_scale
    w = w * decay                                   AdamW, only if weight_decay != 0
    g = fma(weight_decay, w, g)                     Adam,  only if weight_decay != 0
    m = fma(1 - beta1, g - m, m)                    if float(1 - beta1) < 0.5;  else  fma((1 - beta1) - 1, g - m, g)
    v = v * beta2
    v = fma((1 - beta2) * g, g, v)
    r = sqrt(v)                                     IEEE, correctly rounded
    d = r / bias_correction2_sqrt
    d = d + eps
    w = w + (step_size * m) / d

Where exp_avg_sq is not stored in fp32 no step can equal torch's to the bit, and the last three lines are

    d = fma(1 / bias_correction2_sqrt, r, eps)
    w = fma(step_size, m / d, w)

which spares a division and two more operations of some sixty. The fma's are what torch 2.13 does on an AVX2 or AVX-512
CPU, in vectors and tails alike (tests/numerics/test_adam.py); here torch's own operators are called, so that this file
is torch wherever it runs. Two operators differ by place:

- torch's CPU builds take sqrt from MKL, which is wrong in the last bit for a fifth of all numbers on some processors
  (seen with torch 2.13 on an AMD EPYC; torch's own fused Adam uses the processor's sqrt). An optimizer that promises
  equality with torch.optim.Adam, states in fp32 and a master that is fp32, asks for torch's; every other step takes the
  correctly rounded one, which is the same in C++ and Triton. `torch_sqrt_is_ieee` tells whether there is a difference.
- torch on CUDA multiplies by the reciprocal of bias_correction2_sqrt: there results differ in the last bit.

Source: torch.optim.adam, `_single_tensor_adam`; Adam (arXiv 1412.6980); AdamW (arXiv 1711.05101).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class AdamScalars:
    """The numbers of one step, as Python doubles; a kernel rounds each to fp32.

    decay  factor on the weight (AdamW), 1.0 when unused;  l2  weight_decay of Adam, 0.0 when unused
    """

    decay: float
    l2: float
    beta2: float
    one_minus_beta1: float
    one_minus_beta2: float
    bias_correction2_sqrt: float
    eps: float
    step_size: float

    @property
    def inverse_correction2_sqrt(self) -> float:
        """1 / bias_correction2_sqrt, rounded to fp32 only afterwards."""
        return 1 / self.bias_correction2_sqrt

    @classmethod
    def at(
        cls,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        step: int,
        bias_correction: bool = True,
    ) -> AdamScalars:
        """The numbers of step `step` (1 is the first)."""
        bias_correction1 = 1 - beta1**step if bias_correction else 1.0
        bias_correction2_sqrt = (1 - beta2**step) ** 0.5 if bias_correction else 1.0
        return cls(
            decay=1 - lr * weight_decay if decoupled else 1.0,
            l2=0.0 if decoupled else weight_decay,
            beta2=beta2,
            one_minus_beta1=1 - beta1,
            one_minus_beta2=1 - beta2,
            bias_correction2_sqrt=bias_correction2_sqrt,
            eps=eps,
            step_size=-(lr / bias_correction1),
        )


def update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: AdamScalars,
    *,
    torch_sqrt: bool = False,
    divides: bool = True,
) -> torch.Tensor:
    """One step in place on `weight`, `exp_avg`, `exp_avg_sq`; returns sqrt(exp_avg_sq), fp32, for whoever stores it.

    grad        fp32, scaled already, read only
    torch_sqrt  take torch's square root where it is not correctly rounded
    divides     torch's order, for exp_avg_sq in fp32; False takes the shorter one
    """
    if scalars.decay != 1.0:
        weight.mul_(scalars.decay)
    if scalars.l2 != 0.0:
        grad = grad.add(weight, alpha=scalars.l2)
    exp_avg.lerp_(grad, scalars.one_minus_beta1)
    exp_avg_sq.mul_(scalars.beta2).addcmul_(grad, grad, value=scalars.one_minus_beta2)
    root = exp_avg_sq.sqrt() if torch_sqrt else ieee_sqrt(exp_avg_sq)
    if divides:
        denominator = (root / scalars.bias_correction2_sqrt).add_(scalars.eps)
        weight.addcdiv_(exp_avg, denominator, value=scalars.step_size)
    else:
        denominator = torch.full_like(root, scalars.eps).add_(root, alpha=scalars.inverse_correction2_sqrt)
        weight.add_(exp_avg / denominator, alpha=scalars.step_size)
    return root


def ieee_sqrt(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded fp32 square root.

    On CPU by way of fp64, where an error of one unit cannot reach fp32: the root of a 24-bit number is never closer
    than 2^-51 to the middle between two 24-bit numbers, unless it is one.
    """
    if x.device.type != "cpu" or torch_sqrt_is_ieee():
        return x.sqrt()
    return x.double().sqrt().float()


@lru_cache(maxsize=1)
def torch_sqrt_is_ieee() -> bool:
    """Whether torch's fp32 sqrt on this CPU is correctly rounded, by a look at 65,536 numbers of two binades."""
    sample = torch.linspace(1.0, 4.0, 65536, dtype=torch.float32, device="cpu")
    return torch.equal(sample.sqrt(), sample.double().sqrt().float())
