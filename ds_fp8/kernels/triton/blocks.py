"""Block scales for matrix operands on a GPU: 1x128 groups along the sum, 128x128 tiles of a weight.

A product sums over the last axis of both operands, and its three forms sum over three axes. So an activation needs groups
along its features (fprop) and along its tokens (wgrad), and both come from one read: a program takes a 128x128 tile,
writes the codes with row groups as they lie, and those with column groups transposed, which is the layout that Hopper
wants. A weight has one scale for the tile, so its transposed codes are the same codes.
The rule for one group is that of `numerics.gemm_blocks`, to the bit.
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
    ordinary = (amax_bits > 0) & (amax_bits < 0x7F800000)
    return tl.where(ordinary, bits, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(scale):
    """1 / scale, one IEEE division."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _block_kernel(x_ptr, codes_ptr, scale_ptr, turned_ptr, turned_scale_ptr, rows, columns, scale_row, scale_column,
                  turned_scale_row, turned_scale_column, FMT: tl.constexpr, FMAX: tl.constexpr, TILES: tl.constexpr,
                  PLAIN: tl.constexpr, TURNED: tl.constexpr, POWER_OF_TWO: tl.constexpr, EVEN: tl.constexpr,
                  HARDWARE: tl.constexpr):  # fmt: skip
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    first_row, first_column = block_row.to(tl.int64) * 128, block_column.to(tl.int64) * 128
    row, column = tl.arange(0, 128), tl.arange(0, 128)
    # 64 bits for the tile's origin only, added to the pointers first: in every element's index they cost more than the cast.
    origin, inner = first_row * columns + first_column, row[:, None] * columns + column[None, :]
    turned_origin, turned_inner = first_column * rows + first_row, column[:, None] * rows + row[None, :]
    if EVEN:
        inside = tl.full([128, 128], 1, tl.int1)
        turned_inside = inside
        row_inside, column_inside = tl.full([128], 1, tl.int1), tl.full([128], 1, tl.int1)
    else:
        row_inside, column_inside = first_row + row < rows, first_column + column < columns
        inside = row_inside[:, None] & column_inside[None, :]
        turned_inside = column_inside[:, None] & row_inside[None, :]
    x = codec.load(x_ptr + origin + inner, inside)
    bits = codec.magnitude_bits(x)
    codes_ptr = codes_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    turned_ptr = turned_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    if TILES:
        scale = group_scale(tl.max(tl.max(bits, axis=1, keep_dims=True), axis=0, keep_dims=True), FMAX, POWER_OF_TWO)
        tl.store(codes_ptr + origin + inner, codec.encode(x * scale, FMT, HARDWARE), mask=inside)
        place = scale_ptr + block_row * scale_row + block_column * scale_column + tl.zeros([1, 1], tl.int32)
        tl.store(place, reciprocal(scale))
    else:
        if PLAIN:
            scale = group_scale(tl.max(bits, axis=1), FMAX, POWER_OF_TWO)
            tl.store(codes_ptr + origin + inner, codec.encode(x * scale[:, None], FMT, HARDWARE), mask=inside)
            place = scale_ptr + (first_row + row) * scale_row + block_column * scale_column
            tl.store(place, reciprocal(scale), mask=row_inside)
        if TURNED:
            scale = group_scale(tl.max(bits, axis=0), FMAX, POWER_OF_TWO)
            codes = codec.encode(x * scale[None, :], FMT, HARDWARE)
            tl.store(turned_ptr + turned_origin + turned_inner, tl.trans(codes), mask=turned_inside)
            place = turned_scale_ptr + (first_column + column) * turned_scale_row + block_row * turned_scale_column
            tl.store(place, reciprocal(scale), mask=column_inside)


Coded = tuple[torch.Tensor, torch.Tensor]
"""Codes and scale_inv; the caller allocates both, so the scales may have the strides that a product wants."""


def quantize_groups(x: torch.Tensor, fmt: Format, plain: Coded | None, turned: Coded | None,
                    power_of_two: bool = True) -> None:  # fmt: skip
    """1x128 groups of contiguous `x` [..., K] (M rows in all), from one read.

    plain    codes [M, K], scale_inv [M, ceil(K / 128)]: groups along K
    turned   codes [K, M], scale_inv [K, ceil(M / 128)]: groups along M, transposed
    """
    _launch(x, fmt, plain, turned, power_of_two, tiles=False)


def quantize_tiles(x: torch.Tensor, fmt: Format, plain: Coded, power_of_two: bool = True) -> None:
    """128x128 tiles of contiguous `x` [N, K]: codes and scale_inv [tiles of N, tiles of K].

    The transposed codes are a launch of their own (`cast.turn`): written here, Triton 3.6 left wrong ones on an H200, which
    its interpreter did not show.
    """
    _launch(x, fmt, plain, None, power_of_two, tiles=True)


def _launch(x: torch.Tensor, fmt: Format, plain: Coded | None, turned: Coded | None, power_of_two: bool, *,
            tiles: bool) -> None:  # fmt: skip
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    if not rows or not (plain or turned):
        return
    codes, scale_inv = plain or turned or (x, x)
    turned_codes, turned_scale_inv = turned or plain or (x, x)
    tensors = (x, codes, scale_inv, turned_codes, turned_scale_inv)
    numbers = (rows, columns, *scale_inv.stride(), *turned_scale_inv.stride())
    launch = _launch_of(
        x.dtype, codes.dtype, tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors),
        tuple(number == 1 or (number % 16 == 0 and 2) for number in numbers),
        fmt.name, tiles, plain is not None, turned is not None, power_of_two, rows % 128 == 0 and columns % 128 == 0,
        hardware_casts(x),
    )  # fmt: skip
    launch((-(-rows // 128), -(-columns // 128)), tensors, *numbers)


@functools.cache
def _launch_of(dtype: torch.dtype, codes: torch.dtype, addresses: tuple[bool, ...], numbers: tuple[int, ...], fmt: str,
               tiles: bool, plain: bool, turned: bool, power_of_two: bool, even: bool, hardware: bool) -> Launch:  # fmt: skip
    """The launch for one set of everything by which Triton compiles another kernel."""
    constants = (codec.MODES[fmt], FORMATS[fmt].max, tiles, plain, turned, power_of_two, even, hardware)
    return Launch(_block_kernel, constants, num_warps=WARPS)
