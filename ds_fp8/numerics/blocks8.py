"""int8 in scaled blocks of 128: evenly spaced values, for values that are all of one size.

e4m3 spends its quantized values on seventeen powers of two. The ratio m / sqrt(v) of a block spans two or three,
wherever the gradients are (numerics/states.py): there evenly spaced values err less than a quarter as much in the same
bytes.

    scale_inv = max(amax_b / 127, 2^-126);  scale = 1 / scale_inv;  code = RNE(clamp(x * scale, -127, 127))
    decoded   = code * scale_inv

all in fp32, no fma. Stochastic, with the element's random word as in numerics/random_bits.py: on the grid of width 1

    a = min(|x * scale|, 127);  |code| = floor(a + float(bits >> 15) * 2^-17)        product exact, one fp32 addition

which is that file's rule for the binade of 64 to 127 (six mantissa bits, 17 dropped), used below it as well. A whole
number stays what it is, since 127 + (1 - 2^-17) is an fp32 number; -128 is never a code. A zero code has no sign.
A block that is not finite gets scale_inv = NaN and the code 127 everywhere. Quantized values are kept as torch.int8.
"""

from __future__ import annotations

import torch

from .flat import block_scale_inv, spread
from .random_bits import Stochastic, round_to_grid

TOP = 127.0
"""The value that a block's amax is brought to: the largest code."""

NAN_CODE = 127
_MANTISSA_BITS = 6
_MIN_EXPONENT = 6
"""Of the binade 64 to 127, where an ulp with six mantissa bits is 1: the grid of all values."""


def encode(x: torch.Tensor, *, rounding: Stochastic | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values [n] and scale_inv fp32 [ceil(n / 128)] of `x` [n] fp32."""
    scale_inv = block_scale_inv(x, TOP)
    scaled = (x * spread(torch.reciprocal(scale_inv), x.numel())).clamp(-TOP, TOP)
    if rounding is None:
        whole = scaled.round()
    else:
        whole = round_to_grid(scaled.nan_to_num(), _MANTISSA_BITS, _MIN_EXPONENT, rounding.bits(x.numel(), x.device))
    return torch.where(scaled.isnan(), torch.full_like(whole, NAN_CODE), whole).to(torch.int8), scale_inv


def decode(quantized: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """fp32 values [n]."""
    return quantized.float() * spread(scale_inv, quantized.numel())
