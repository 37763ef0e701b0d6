"""Block codecs of flat partitions on a GPU: the Triton counterparts of `numerics.flat`.

A program takes ROWS blocks of 128 consecutive elements as one [ROWS, 128] tile, so that a block's amax is a reduction
along the last axis and nothing is read twice. All arithmetic is fp32 with IEEE division and without fused multiply-add
(`enable_fp_fusion=False`): the quantized values equal those of the CPU bit for bit. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats import BLOCK_SIZE, Format
from ...numerics.random_bits import Stochastic
from . import codec
from .launch import LAUNCH, hardware_casts, on_device

ROWS = 16
"""Blocks per program: 2048 elements, eight per thread and four warps; the best of 4 to 64 is a matter of benchmarks."""


@triton.jit
def _folded(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] by halves, as `numerics.flat.sum_by_halves`: a sum of two has only one order."""
    return tl.sum(tl.reshape(x, [ROWS, 2, WIDTH // 2]), axis=1)


@triton.jit
def _error_under(x, scale, FMT: tl.constexpr, ROWS: tl.constexpr, HARDWARE: tl.constexpr):
    """Squared error of casting x [ROWS, 128] under `scale` [ROWS], in units of the quantized values."""
    scaled = x * scale[:, None]
    missed = codec.value_of(codec.encode(scaled, FMT, HARDWARE), FMT, HARDWARE) - scaled
    error = _folded(missed * missed, ROWS, 128)
    error = _folded(_folded(error, ROWS, 64), ROWS, 32)
    error = _folded(_folded(error, ROWS, 16), ROWS, 8)
    error = _folded(_folded(error, ROWS, 4), ROWS, 2)
    return tl.reshape(error, [ROWS])


@triton.jit
def encode_best_of_two(x, FMT: tl.constexpr, FMAX: tl.constexpr, ROWS: tl.constexpr, HARDWARE: tl.constexpr):
    """(quantized, scale_inv) under the better of two scales; `FMAX` is 7 / 4 of a power of two.

    The scale is chosen and the cast made again, though both casts are there: ptxas 12.8 (in Triton 3.6) makes wrong
    code of a choice between bytes that its own FP8 conversions packed, the second of each pair a copy of the first.
    """
    upper, upper_inv = codec.block_scale(x, FMAX, 1, HARDWARE)
    lower, lower_inv = codec.block_scale(x, FMAX * 4 / 7, 1, HARDWARE)
    upper_error = _error_under(x, upper, FMT, ROWS, HARDWARE)
    lower_error = _error_under(x, lower, FMT, ROWS, HARDWARE)
    is_lower = lower_error * 3.0625 < upper_error
    scale = tl.where(is_lower, lower, upper)
    return codec.encode(x * scale[:, None], FMT, HARDWARE), tl.where(is_lower, lower_inv, upper_inv)


@triton.jit(do_not_specialize=["key", "first"])
def _encode_kernel(x_ptr, quantized_ptr, scale_inv_ptr, n, key, first, FMT: tl.constexpr, FMAX: tl.constexpr,
                   STOCHASTIC: tl.constexpr, BEST_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
                   HARDWARE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = index < n
    x = codec.load(x_ptr + index, inside)
    if BEST_OF_TWO:
        quantized, scale_inv = encode_best_of_two(x, FMT, FMAX, ROWS, HARDWARE)
    else:
        scale, scale_inv = codec.block_scale(x, FMAX, 1, HARDWARE)
        scaled = x * scale[:, None]
        if STOCHASTIC:
            quantized = codec.encode_stochastic(scaled, codec.random_words(index + first, key), FMT)
        else:
            quantized = codec.encode(scaled, FMT, HARDWARE)
    tl.store(quantized_ptr + index, quantized, mask=inside)
    tl.store(scale_inv_ptr + row, scale_inv, mask=row * 128 < n)


@triton.jit
def _decode_kernel(quantized_ptr, scale_inv_ptr, out_ptr, n, FMT: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = index < n
    scale_inv = tl.load(scale_inv_ptr + row, mask=row * 128 < n, other=1.0)
    value = codec.decode(tl.load(quantized_ptr + index, mask=inside, other=0), FMT) * scale_inv[:, None]
    codec.store(out_ptr + index, value, inside)


@triton.jit
def _sum_kernel(own_ptr, quantized_ptr, scale_inv_ptr, out_ptr, out_scale_ptr, factor, n, quantized_stride,
                scale_stride, WORLD: tl.constexpr, FMT: tl.constexpr, OUT_FMT: tl.constexpr, FMAX: tl.constexpr,
                REQUANTISE: tl.constexpr, OWN: tl.constexpr, BEST_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
                HARDWARE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = index < n
    element, block = index, row
    quantized = tl.load(quantized_ptr + element, mask=inside, other=0)
    scale_inv = tl.load(scale_inv_ptr + block, mask=row * 128 < n, other=0.0)
    total = codec.decode(quantized, FMT) * scale_inv[:, None]
    if OWN:
        total = codec.load(own_ptr + index, inside) + total
    # In rank order, so that every owner and every device gets the same sum.
    for _ in range(1, WORLD):
        element += quantized_stride
        block += scale_stride
        quantized = tl.load(quantized_ptr + element, mask=inside, other=0)
        scale_inv = tl.load(scale_inv_ptr + block, mask=row * 128 < n, other=0.0)
        total = total + codec.decode(quantized, FMT) * scale_inv[:, None]
    total = total * factor
    if REQUANTISE:
        if BEST_OF_TWO:
            quantized, scale_inv = encode_best_of_two(total, OUT_FMT, FMAX, ROWS, HARDWARE)
        else:
            scale, scale_inv = codec.block_scale(total, FMAX, 1, HARDWARE)
            quantized = codec.encode(total * scale[:, None], OUT_FMT, HARDWARE)
        tl.store(out_ptr + index, quantized, mask=inside)
        tl.store(out_scale_ptr + row, scale_inv, mask=row * 128 < n)
    else:
        codec.store(out_ptr + index, total, inside)


def _grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, ROWS * BLOCK_SIZE),)


def signed(word: int) -> int:
    """A 32-bit word as the signed integer that Triton passes in 32 bits."""
    return (word + 2**31) % 2**32 - 2**31


def encode(x: torch.Tensor, fmt: Format, quantized: torch.Tensor, scale_inv: torch.Tensor,
           rounding: Stochastic | None = None, best_of_two: bool = False) -> None:  # fmt: skip
    """Fill `quantized` [n] uint8 and `scale_inv` [ceil(n / 128)] fp32 from contiguous `x` [n] in fp32, bf16 or fp16."""
    n = x.numel()
    key, first = (signed(rounding.key), rounding.first) if rounding else (0, 0)
    if n:
        with on_device(x):
            _encode_kernel[_grid(n)](
                x, quantized, scale_inv, n, key, first,
                codec.MODES[fmt.name], fmt.max, rounding is not None, best_of_two, ROWS, hardware_casts(x), **LAUNCH,
            )  # fmt: skip


def decode(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """Fill `out` [n] (fp32, bf16 or fp16) with quantized * scale_inv, rounded to nearest even."""
    n = quantized.numel()
    if n:
        with on_device(quantized):
            _decode_kernel[_grid(n)](quantized, scale_inv, out, n, codec.MODES[fmt.name], ROWS, **LAUNCH)


def sum_contributions(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, factor: float,
                      out: torch.Tensor, own: torch.Tensor | None = None) -> None:  # fmt: skip
    """Fill `out` [n] with factor * (own + sum over ranks of quantized [W, n] * scale_inv [W, blocks]); rows may be
    strided.
    """
    _sum(quantized, scale_inv, fmt, factor, out, scale_inv, None, own, False)


def sum_and_encode(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, factor: float, out_fmt: Format,
                   quantized_out: torch.Tensor, out_scale_inv: torch.Tensor, own: torch.Tensor | None = None,
                   best_of_two: bool = False) -> None:  # fmt: skip
    """The same sum, encoded again: `quantized_out` [n] uint8 in `out_fmt` and `out_scale_inv` [blocks]."""
    _sum(quantized, scale_inv, fmt, factor, quantized_out, out_scale_inv, out_fmt, own, best_of_two)


def _sum(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, factor: float, out: torch.Tensor,
         out_scale_inv: torch.Tensor, out_fmt: Format | None, own: torch.Tensor | None,
         best_of_two: bool) -> None:  # fmt: skip
    world, n = quantized.shape
    target = out_fmt or fmt
    if n:
        with on_device(quantized):
            _sum_kernel[_grid(n)](
                scale_inv if own is None else own, quantized, scale_inv, out, out_scale_inv, factor, n,
                quantized.stride(0), scale_inv.stride(0), world, codec.MODES[fmt.name], codec.MODES[target.name],
                target.max, out_fmt is not None, own is not None, best_of_two, ROWS, hardware_casts(quantized),
                **LAUNCH,
            )  # fmt: skip
