"""Block scales for the operands of a matrix product: 1x128 for activations and gradients, 128x128 for weights.

The last axis is the one that the product sums over, so a 1x128 group lies along it. Edges may be short: a group or
tile at the end simply has fewer elements. The rule for one group or tile, in fp32:

    scale = format.max / amax          0 or non-finite amax: 1;  an infinite scale: the largest finite fp32
    scale = 2 ** floor(log2(scale))    if power_of_two: clear the mantissa bits (Transformer Engine's default)
    scale_inv = 1 / scale
    code = RNE(clamp(x * scale))

A product is not hurt by powers of two; an optimizer state is (docs/numerics.md), which is why `flat` has another rule.
Source: Transformer Engine 2.20, Float8BlockScaling; DeepSeek-V3 (arXiv 2412.19437), section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import BLOCK_SIZE, Format
from .cast import saturate
from .scaling import scale_from_amax

_EXPONENT_ONLY = -0x00800000  # 0xff800000 as a signed 32-bit pattern: sign and exponent, no mantissa


def quantize_1x128(x: torch.Tensor, fmt: Format, *, power_of_two: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized values of `x` [..., K] (any float dtype) and scale_inv [..., ceil(K / 128)] fp32."""
    return _quantize_tiles(x, fmt, 1, power_of_two)


def quantize_128x128(x: torch.Tensor, fmt: Format, *, power_of_two: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized values of `x` [N, K] (any float dtype) and scale_inv [ceil(N / 128), ceil(K / 128)] fp32."""
    return _quantize_tiles(x, fmt, BLOCK_SIZE, power_of_two)


def dequantize_1x128(
    quantized: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Quantized values [..., K] times the scale_inv of their group, rounded to fp32 and then to `dtype`."""
    return (quantized.float() * _spread(scale_inv, 1, quantized)).to(dtype)


def dequantize_128x128(
    quantized: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Quantized values [N, K] times the scale_inv of their tile, rounded to fp32 and then to `dtype`."""
    return (quantized.float() * _spread(scale_inv, BLOCK_SIZE, quantized)).to(dtype)


def block_scale(amax: torch.Tensor, fmt: Format, *, power_of_two: bool) -> torch.Tensor:
    """The rule above for any shape of amaxes, without the inverse."""
    scale = scale_from_amax(amax, fmt)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_ONLY).view(torch.float32)
    return scale


def _quantize_tiles(x: torch.Tensor, fmt: Format, rows: int, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.detach().float()
    scale = block_scale(_tile_amax(values, rows), fmt, power_of_two=power_of_two)
    return saturate(values * _spread(scale, rows, x), fmt), torch.reciprocal(scale)


def _tile_amax(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Largest |x| of each tile of `rows` x 128; padding with zeros does not change it."""
    k = values.shape[-1]
    padded = F.pad(values, (0, -k % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE)).abs().amax(-1)
    if rows == 1:
        return padded
    return F.pad(padded, (0, 0, 0, -padded.shape[0] % rows)).unflatten(0, (-1, rows)).amax(1)


def _spread(scales: torch.Tensor, rows: int, like: torch.Tensor) -> torch.Tensor:
    """Each tile's scale at each of its elements, in the shape of `like`."""
    spread = scales.repeat_interleave(BLOCK_SIZE, dim=-1)[..., : like.shape[-1]]
    return spread if rows == 1 else spread.repeat_interleave(rows, dim=0)[: like.shape[0]]
