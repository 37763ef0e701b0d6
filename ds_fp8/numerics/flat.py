"""Flat partitions: blocks of 128 consecutive elements, one fp32 scale each, no tensor boundaries to care about.

ZeRO flattens parameters into one vector and cuts it by ranks. Scales that belong to 128 consecutive elements of that
vector, not to a tensor, make one code serve all ZeRO stages and offload. For a block b:

    scale_inv = max(amax_b / format.max, 2^-126)      one fp32 division, and an inverse that stays finite
    scale     = 1 / scale_inv                         one fp32 division
    code      = RNE(clamp(x * scale, -format.max, format.max))
    decoded   = code * scale_inv                      in fp32, then rounded to the wanted dtype

The scale is exact, not a power of two: with powers of two an 8-bit state freezes (docs/numerics.md). No fma anywhere.
`best_of_two` blocks, as gradients travel, take the better of two scales: amax at format.max, which is 1.75 * 2^n, or at
2^n. The spacing of FP8 values doubles at each power of two, so no one place of amax suits all blocks; both are exact
FP8 values, so amax itself survives. Better is the smaller squared error of the block (summed by halves: i + 64 onto i,
i + 32 onto i, ...). A block that holds infinity or NaN gets scale_inv = NaN and the code 0x7f everywhere, so all of it
decodes to NaN and an overflow on one rank is seen by every rank. Signs are kept, that of zero too. The last block may
be short.
Source: block-wise 8-bit optimizers (arXiv 2110.02861) for the idea of blocks; the rule is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import BLOCK_SIZE, E4M3, Format
from .cast import divide, saturate
from .dtypes import as_quantized
from .random_bits import Stochastic, round_to_grid

SMALLEST_SCALE_INV = 2.0**-126
NAN_CODE = 0x7F


def blocks_of(numel: int) -> int:
    """Blocks that `numel` elements fill."""
    return -(-numel // BLOCK_SIZE)


def as_blocks(x: torch.Tensor) -> torch.Tensor:
    """`x` [n] as [ceil(n / 128), 128], the tail filled with zeros; a view when n is a multiple of 128."""
    return F.pad(x, (0, -x.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)


def spread(per_block: torch.Tensor, numel: int) -> torch.Tensor:
    """The block's value at each of its elements: [blocks] -> [n]."""
    return per_block.repeat_interleave(BLOCK_SIZE)[:numel]


def block_scale_inv(x: torch.Tensor, top: float) -> torch.Tensor:
    """scale_inv [blocks] that brings each block's amax to `top`; NaN for a block that is not finite."""
    if x.numel() == 0:
        return x.new_empty(0)
    amax = as_blocks(x).abs().amax(dim=1)
    scale_inv = divide(amax, top).clamp(min=SMALLEST_SCALE_INV)
    return torch.where(torch.isfinite(amax), scale_inv, torch.full_like(amax, torch.nan))


def round_fp8(x: torch.Tensor, fmt: Format, rounding: Stochastic | None) -> torch.Tensor:
    """`x` [n] fp32, scaled already, in quantized form (uint8): clamp, then RNE or stochastic; NaN becomes 0x7f."""
    if rounding is not None:
        min_exponent = -6 if fmt == E4M3 else -14
        bits = rounding.bits(x.numel(), x.device)
        x = torch.where(x.isnan(), x, round_to_grid(x.clamp(-fmt.max, fmt.max), fmt.mantissa_bits, min_exponent, bits))
    quantized = saturate(x, fmt).view(torch.uint8)
    return torch.where(x.isnan(), torch.full_like(quantized, NAN_CODE), quantized)


def encode(
    x: torch.Tensor,
    fmt: Format,
    *,
    rounding: Stochastic | None = None,
    best_of_two: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized values (uint8 [n]) and scale_inv (fp32 [ceil(n / 128)]) of `x` [n], fp32, bf16 or fp16.

    best_of_two  each block takes the better of two scales; with rounding to nearest only
    out          where the two go, and what is returned
    """
    values = x.detach().float()
    if best_of_two:
        assert rounding is None, "the better scale is chosen for rounding to nearest"
        quantized, scale_inv = encode_fitted(values, fmt)
    else:
        scale_inv = block_scale_inv(values, fmt.max)
        scaled = values * spread(torch.reciprocal(scale_inv), values.numel())
        quantized = round_fp8(scaled, fmt, rounding)
    return (quantized, scale_inv) if out is None else (out[0].copy_(quantized), out[1].copy_(scale_inv))


def encode_fitted(values: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode` of fp32 `values` [n] under the better of two scales."""
    made = []
    for top in (fmt.max, lower_top(fmt)):
        scale_inv = block_scale_inv(values, top)
        scaled = values * spread(torch.reciprocal(scale_inv), values.numel())
        quantized = round_fp8(scaled, fmt, None)
        missed = as_quantized(quantized, fmt).float() - scaled
        made.append((quantized, scale_inv, sum_by_halves(as_blocks(missed * missed))))
    (upper, upper_inv, upper_error), (lower, lower_inv, lower_error) = made
    # Errors are in units of the quantized values; (top / lower_top)^2 = 49 / 16 is exact. A block of NaN takes the
    # first.
    is_lower = lower_error * (49 / 16) < upper_error
    return torch.where(spread(is_lower, values.numel()), lower, upper), torch.where(is_lower, lower_inv, upper_inv)


def lower_top(fmt: Format) -> float:
    """The power of two below the format's maximum: 256 or 32768."""
    return fmt.max * 4 / 7


def sum_by_halves(blocks: torch.Tensor) -> torch.Tensor:
    """Sums of [blocks, 128] by halves: one order of additions, which vectors of any width can follow."""
    width = blocks.shape[1]
    while width > 1:
        width //= 2
        blocks = blocks[:, :width] + blocks[:, width:]
    return blocks[:, 0]


def decode(
    quantized: torch.Tensor,
    scale_inv: torch.Tensor,
    fmt: Format,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The values of `quantized` [n]; written into `out` (its dtype decides) or returned in `dtype`."""
    values = as_quantized(quantized, fmt).float() * spread(scale_inv, quantized.numel())
    return values.to(dtype) if out is None else out.copy_(values)


def sum_contributions(
    quantized: torch.Tensor,
    scale_inv: torch.Tensor,
    fmt: Format,
    *,
    factor: float = 1.0,
    out: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the ranks' contributions, times `factor`: what the owner of a slice does with the bytes it received.

    own   [n], fp32, bf16 or fp16: the owner's contribution, never cast, with which the sum begins
    quantized [W, n] uint8, scale_inv [W, ceil(n / 128)] fp32; rows may be strided views of one message
    returns `out`, or fp32 [n]. In fp32 and in rank order: total = d_0; total = total + d_w; total = total * factor;
    each operation rounded (no fma), then once to out's dtype.
    """
    total = decode(quantized[0], scale_inv[0], fmt) if own is None else own.detach().float().clone()
    for rank in range(1 if own is None else 0, quantized.shape[0]):
        total.add_(decode(quantized[rank], scale_inv[rank], fmt))
    total.mul_(factor)
    return total if out is None else out.copy_(total)


def sum_and_encode(
    quantized: torch.Tensor,
    scale_inv: torch.Tensor,
    fmt: Format,
    *,
    factor: float = 1.0,
    out_fmt: Format | None = None,
    own: torch.Tensor | None = None,
    best_of_two: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode(sum_contributions(...), out_fmt or fmt)`: the requantized sum that stage 0 gathers."""
    total = sum_contributions(quantized, scale_inv, fmt, factor=factor, own=own)
    return encode(total, out_fmt or fmt, best_of_two=best_of_two, out=out)
