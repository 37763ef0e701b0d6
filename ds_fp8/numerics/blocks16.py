"""fp16 in scaled blocks of 128: a 16-bit code that does not underflow.

Unscaled fp16 ends at 6e-8, and the gradients of large models lie below that. Each block of 128 elements therefore
carries an fp32 scale_inv that brings its amax to 2^15, half of fp16's range, which leaves 39 powers of two below it:

    scale_inv = max(amax_b / 2^15, 2^-126);  scale = 1 / scale_inv;  code = RNE_fp16(x * scale)
    decoded   = code * scale_inv

all in fp32, no fma. A block that is not finite gets scale_inv = NaN and NaN quantized values (0x7e00).
Used for sqrt(exp_avg_sq), exp_avg and the fp16 master. Quantized values are kept as torch.float16, which says what they
are.
"""

from __future__ import annotations

import torch

from ..formats import FP16
from .flat import block_scale_inv, spread
from .random_bits import Stochastic, round_to_grid

TOP = 2.0**15
"""The value that a block's amax is brought to."""

_MIN_EXPONENT = -14


def encode(x: torch.Tensor, *, rounding: Stochastic | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 values [n] and scale_inv fp32 [ceil(n / 128)] of `x` [n] fp32."""
    scale_inv = block_scale_inv(x, TOP)
    scaled = x * spread(torch.reciprocal(scale_inv), x.numel())
    if rounding is not None:
        bits = rounding.bits(x.numel(), x.device)
        scaled = torch.where(scaled.isnan(), scaled, round_to_grid(scaled, FP16.mantissa_bits, _MIN_EXPONENT, bits))
    quantized = scaled.to(torch.float16)
    return torch.where(quantized.isnan(), torch.full_like(quantized, torch.nan), quantized), scale_inv


def decode(quantized: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """fp32 values [n]."""
    return quantized.float() * spread(scale_inv, quantized.numel())
