"""e4m3 values that stretch to the range of their block.

e4m3 spans 17.8 powers of two, but 128 neighbouring moments mostly span fewer: the FP8 values for the rest are unused.
Raising magnitudes to a power k >= 1 before the cast spreads the block over all quantized values. With u = |x| / amax_b
in (0, 1]:

    code = RNE_e4m3(448 * u^k)                       so amax itself is always code 448
    |x|  = scale_inv * 448 * (code / 448)^(1/k)      scale_inv = amax_b / 448, as in `flat`

k is kept as uint8 in sixteenths (`expansion`, 16 to 255): the largest k for which the block's smallest nonzero |x|
still has a code. At k = 1 this is e4m3 without expansion, so it is never worse. Metadata: 5 bytes for each 128
elements.

Bit for bit the same everywhere, hence spelled out; fp32, each operation rounded, no fma:

    scale_inv, scale as in flat;  a = min(|x| * scale, 448);  u = a / 448;  u < 2^-126 counts as zero
    log2(u):  e, m from the bits, m in [1, 2);  if m > 1.41421354: m = m / 2, e = e + 1;  f = m - 1
              p = c6;  p = p * f + c5;  ... p = p * f + c0;  log2 = float(e) + f * p
    exp2(y):  y = max(y, -126);  n = floor(y + 0.5);  f = y - n;  p = d4;  ... p = p * f + d0;  exp2 = 2^n * (1 + f * p)
    span = -log2(smallest nonzero u of the block)
    expansion = floor(min(max(284.917694 / span, 16), 255));  span = 0, one magnitude or only zeros, gives 255
    k = expansion / 16
    code = RNE_e4m3(448 * exp2(k * log2(u))), or stochastic;  u = 0 gives code 0;  the sign of x is kept
    decode: value = TABLE[expansion][code & 0x7f] * scale_inv, with the code's sign
            TABLE[e][c] = 448 * exp2(log2(value(c) / 448) * (16 / e))   (1st product: quotient 16/e rounded first)

A block that is not finite gets scale_inv = NaN, expansion 16 and quantized values 0x7f.
Source: COAT (arXiv 2410.19313), dynamic range expansion. COAT anchors a block at sqrt(max * min) and keeps a scale
besides; anchored at the maximum one number is enough, it is exact, and the largest element is exact too.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..formats import BLOCK_SIZE, E4M3
from .cast import divide
from .flat import as_blocks, block_scale_inv, round_fp8, spread
from .random_bits import Stochastic, power_of_two

EXPANSION_UNIT = 16
MIN_EXPANSION, MAX_EXPANSION = 16, 255
E4M3_SPAN = 17.807355880737305
"""log2(448 / 2^-9) as fp32."""

SMALLEST_RATIO = 2.0**-126
_SQRT2 = 1.4142135381698608
LOG2_COEFFICIENTS = (
    1.4426965713500977,
    -0.7213602066040039,
    0.480613112449646,
    -0.3595244586467743,
    0.2961195707321167,
    -0.26796385645866394,
    0.16818659007549286,
)
"""log2(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], Chebyshev interpolation, error 7e-7; constant term first."""
EXP2_COEFFICIENTS = (
    0.6931471824645996,
    0.2402234971523285,
    0.055503811687231064,
    0.00966636836528778,
    0.0013381302123889327,
)
"""(2^f - 1) / f on [-1/2, 1/2], Chebyshev interpolation, error 2e-7; constant term first."""


def log2(u: torch.Tensor) -> torch.Tensor:
    """log2 of positive normal fp32 numbers by the operations above; log2(1) is exactly 0."""
    bits = u.view(torch.int32)
    exponent = (bits >> 23) - 127
    mantissa = (bits & 0x007FFFFF | 0x3F800000).view(torch.float32)
    high = mantissa > _SQRT2
    mantissa = torch.where(high, mantissa * 0.5, mantissa)
    fraction = mantissa - 1.0
    return (exponent + high.to(torch.int32)).float() + fraction * _horner(LOG2_COEFFICIENTS, fraction)


def exp2(y: torch.Tensor) -> torch.Tensor:
    """2 ** y for fp32 y <= 0 by the operations above; exp2(0) is exactly 1; below -126 it stays 2^-126."""
    y = y.clamp(min=-126.0)
    whole = torch.floor(y + 0.5)
    fraction = y - whole
    return power_of_two(whole.to(torch.int32)) * (fraction * _horner(EXP2_COEFFICIENTS, fraction) + 1.0)


def _horner(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    """Product, then sum, from the highest coefficient down; two rounded operations each, never one fma."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = (total * x) + coefficient
    return total


@lru_cache(maxsize=8)
def table(device: torch.device | str = "cpu") -> torch.Tensor:
    """TABLE of the module docstring, fp32 [256, 128]; rows below MIN_EXPANSION are unused copies of row 16."""
    values = torch.arange(128, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
    positive = values[1:127]
    logs = log2(divide(positive, E4M3.max))
    rows = torch.arange(256, dtype=torch.float32, device="cpu").clamp(min=MIN_EXPANSION)
    result = torch.zeros(256, 128, dtype=torch.float32, device="cpu")
    result[:, 1:127] = E4M3.max * exp2(logs[None, :] * (EXPANSION_UNIT / rows)[:, None])
    result[:, 127] = torch.nan
    return result.to(device)


def encode(x: torch.Tensor, *, rounding: Stochastic | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantized values uint8 [n], scale_inv fp32 [blocks] and expansion uint8 [blocks] of `x` [n] fp32."""
    scale_inv = block_scale_inv(x, E4M3.max)
    ratio = (x.abs() * spread(torch.reciprocal(scale_inv), x.numel())).clamp(max=E4M3.max)
    ratio = divide(ratio, E4M3.max)
    is_zero = ratio < SMALLEST_RATIO
    logs = log2(ratio.clamp(min=SMALLEST_RATIO))
    expansion = _block_expansion(torch.where(is_zero, torch.zeros_like(logs), logs), scale_inv)
    expanded = E4M3.max * exp2(logs * spread(expansion.float() / EXPANSION_UNIT, x.numel()))
    expanded = torch.where(is_zero, torch.zeros_like(expanded), expanded)
    expanded = torch.where(spread(scale_inv, x.numel()).isnan(), torch.full_like(expanded, torch.nan), expanded)
    return round_fp8(torch.copysign(expanded, x), E4M3, rounding), scale_inv, expansion


def _block_expansion(logs: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks] from log2(u) <= 0 [n], zero where u is zero."""
    if logs.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=logs.device)
    span = as_blocks(logs).amin(dim=1).abs()
    wanted = torch.full_like(span, EXPANSION_UNIT * E4M3_SPAN) / span
    wanted = torch.where(torch.isfinite(scale_inv), wanted, torch.full_like(wanted, MIN_EXPANSION))
    return wanted.clamp(MIN_EXPANSION, MAX_EXPANSION).floor().to(torch.uint8)


def decode(quantized: torch.Tensor, scale_inv: torch.Tensor, expansion: torch.Tensor) -> torch.Tensor:
    """fp32 values [n]."""
    row = spread(expansion, quantized.numel()).to(torch.int64)
    magnitude = table(quantized.device).view(-1)[row * BLOCK_SIZE + (quantized & 0x7F).to(torch.int64)]
    value = magnitude * spread(scale_inv, quantized.numel())
    return torch.where(quantized >= 0x80, -value, value)
