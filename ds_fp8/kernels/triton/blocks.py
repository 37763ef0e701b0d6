"""Block scales for matrix operands on a GPU: 1x128 groups along the sum, 128x128 tiles of a weight.

A product sums over the last axis of both operands, and its three forms sum over three axes. So an activation needs
groups along its features (fprop) and along its tokens (wgrad), and both come from one read: a program takes a 128x128
tile, writes the quantized values with row groups as they lie, and those with column groups transposed, which is the
layout that Hopper wants. A weight has one scale for the tile, so its transposed data are the same quantized values. The
rule for one group is that of `numerics.gemm_blocks`, to the bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...formats import FORMATS, Format
from . import codec
from .launch import Launch, hardware_casts

WARPS = 4
"""Of one program; chosen by measurement (docs/gpu.md)."""


@triton.jit
def group_scale(amax_bits, FMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """fp32 scales of groups from the bits of their amax; 1 where that is zero or not finite."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full(amax.shape, FMAX, tl.float32), tl.where(amax_bits == 0, 1.0, amax))
    bits = tl.minimum(scale.to(tl.int32, bitcast=True), 0x7F7FFFFF)  # an infinite scale: the largest finite fp32
    if POWER_OF_TWO:
        bits = bits & 0x7F800000
    positive_finite = (amax_bits > 0) & (amax_bits < 0x7F800000)
    return tl.where(positive_finite, bits, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(scale):
    """1 / scale, one IEEE division."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _block_kernel(x_ptr, quantized_ptr, scale_ptr, transposed_ptr, transposed_scale_ptr, rows, columns, scale_row,
                  scale_column, transposed_scale_row, transposed_scale_column, FMT: tl.constexpr, FMAX: tl.constexpr,
                  TILES: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, POWER_OF_TWO: tl.constexpr,
                  EVEN: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    first_row, first_column = block_row.to(tl.int64) * 128, block_column.to(tl.int64) * 128
    row, column = tl.arange(0, 128), tl.arange(0, 128)
    # 64 bits for the tile's origin only, added to the pointers first: in every element's index they cost more than the
    # cast.
    origin, inner = first_row * columns + first_column, row[:, None] * columns + column[None, :]
    transposed_origin, transposed_inner = first_column * rows + first_row, column[:, None] * rows + row[None, :]
    if EVEN:
        inside = tl.full([128, 128], 1, tl.int1)
        transposed_inside = inside
        row_inside, column_inside = tl.full([128], 1, tl.int1), tl.full([128], 1, tl.int1)
    else:
        row_inside, column_inside = first_row + row < rows, first_column + column < columns
        inside = row_inside[:, None] & column_inside[None, :]
        transposed_inside = column_inside[:, None] & row_inside[None, :]
    x = codec.load(x_ptr + origin + inner, inside)
    bits = codec.magnitude_bits(x)
    quantized_ptr = quantized_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    transposed_ptr = transposed_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    if TILES:
        scale = group_scale(tl.max(tl.max(bits, axis=1, keep_dims=True), axis=0, keep_dims=True), FMAX, POWER_OF_TWO)
        tl.store(quantized_ptr + origin + inner, codec.encode(x * scale, FMT, HARDWARE), mask=inside)
        place = scale_ptr + block_row * scale_row + block_column * scale_column + tl.zeros([1, 1], tl.int32)
        tl.store(place, reciprocal(scale))
    else:
        if STRAIGHT:
            scale = group_scale(tl.max(bits, axis=1), FMAX, POWER_OF_TWO)
            tl.store(quantized_ptr + origin + inner, codec.encode(x * scale[:, None], FMT, HARDWARE), mask=inside)
            place = scale_ptr + (first_row + row) * scale_row + block_column * scale_column
            tl.store(place, reciprocal(scale), mask=row_inside)
        if TRANSPOSED:
            scale = group_scale(tl.max(bits, axis=0), FMAX, POWER_OF_TWO)
            quantized = codec.encode(x * scale[None, :], FMT, HARDWARE)
            tl.store(transposed_ptr + transposed_origin + transposed_inner, tl.trans(quantized), mask=transposed_inside)
            place = (
                transposed_scale_ptr
                + (first_column + column) * transposed_scale_row
                + block_row * transposed_scale_column
            )
            tl.store(place, reciprocal(scale), mask=column_inside)


Quantized = tuple[torch.Tensor, torch.Tensor]
"""Quantized values and scale_inv; the caller allocates both, so the scales may have the strides that a product
wants.
"""


def quantize_groups(x: torch.Tensor, fmt: Format, straight: Quantized | None, transposed: Quantized | None,
                    power_of_two: bool = True) -> None:  # fmt: skip
    """1x128 groups of contiguous `x` [..., K] (M rows in all), from one read.

    straight    quantized [M, K], scale_inv [M, ceil(K / 128)]: groups along K
    transposed  quantized [K, M], scale_inv [K, ceil(M / 128)]: groups along M, transposed
    """
    _launch(x, fmt, straight, transposed, power_of_two, tiles=False)


def quantize_tiles(x: torch.Tensor, fmt: Format, straight: Quantized, power_of_two: bool = True) -> None:
    """128x128 tiles of contiguous `x` [N, K]: quantized values and scale_inv [tiles of N, tiles of K].

    The transposed data are a launch of their own (`cast.turn`): written here, Triton 3.6 left wrong ones on an H200,
    which its interpreter did not show.
    """
    _launch(x, fmt, straight, None, power_of_two, tiles=True)


def _launch(x: torch.Tensor, fmt: Format, straight: Quantized | None, transposed: Quantized | None, power_of_two: bool,
            *, tiles: bool) -> None:  # fmt: skip
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    if not rows or not (straight or transposed):
        return
    quantized, scale_inv = straight or transposed or (x, x)
    transposed_quantized, transposed_scale_inv = transposed or straight or (x, x)
    tensors = (x, quantized, scale_inv, transposed_quantized, transposed_scale_inv)
    numbers = (rows, columns, *scale_inv.stride(), *transposed_scale_inv.stride())
    launch = _launch_of(
        x.dtype, quantized.dtype, tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors),
        tuple(number == 1 or (number % 16 == 0 and 2) for number in numbers),
        fmt.name, tiles, straight is not None, transposed is not None, power_of_two,
        rows % 128 == 0 and columns % 128 == 0, hardware_casts(x),
    )  # fmt: skip
    launch((-(-rows // 128), -(-columns // 128)), tensors, *numbers)


@functools.cache
def _launch_of(dtype: torch.dtype, quantized: torch.dtype, addresses: tuple[bool, ...], numbers: tuple[int, ...],
               fmt: str, tiles: bool, straight: bool, transposed: bool, power_of_two: bool, even: bool,
               hardware: bool) -> Launch:  # fmt: skip
    """The launch for one set of everything by which Triton compiles another kernel."""
    constants = (codec.MODES[fmt], FORMATS[fmt].max, tiles, straight, transposed, power_of_two, even, hardware)
    return Launch(_block_kernel, constants, num_warps=WARPS)
