"""Block scales for matrix operands on a GPU: 1x128 groups along the sum, 128x128 tiles of a weight.

A product sums over the last axis of both operands, and its three forms sum over three axes. So an activation needs groups
along its features (fprop) and along its tokens (wgrad), and both come from one read: a program takes a 128x128 tile,
writes the codes with row groups as they lie, and those with column groups transposed, which is the layout that Hopper
wants. A weight has one scale for the tile, so its transposed codes are the same codes.
The rule for one group is that of `numerics.gemm_blocks`, to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats import Format
from . import codec
from .launch import LAUNCH, hardware_casts, on_device


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
                  PLAIN: tl.constexpr, TURNED: tl.constexpr, POWER_OF_TWO: tl.constexpr,
                  HARDWARE: tl.constexpr):  # fmt: skip
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    row = block_row.to(tl.int64) * 128 + tl.arange(0, 128)
    column = block_column.to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    x = codec.load(x_ptr + row[:, None] * columns + column[None, :], inside)
    bits = codec.magnitude_bits(x)
    turned_index = column[:, None] * rows + row[None, :]
    turned_inside = (column[:, None] < columns) & (row[None, :] < rows)
    if TILES:
        scale = group_scale(tl.max(tl.max(bits, axis=1, keep_dims=True), axis=0, keep_dims=True), FMAX, POWER_OF_TWO)
        codes = codec.encode(x * scale, FMT, HARDWARE)
        tl.store(codes_ptr + row[:, None] * columns + column[None, :], codes, mask=inside)
        here = scale_ptr + block_row * scale_row + block_column * scale_column + tl.zeros([1, 1], tl.int32)
        tl.store(here, reciprocal(scale))
    else:
        if PLAIN:
            scale = group_scale(tl.max(bits, axis=1), FMAX, POWER_OF_TWO)
            codes = codec.encode(x * scale[:, None], FMT, HARDWARE)
            tl.store(codes_ptr + row[:, None] * columns + column[None, :], codes, mask=inside)
            tl.store(scale_ptr + row * scale_row + block_column * scale_column, reciprocal(scale), mask=row < rows)
        if TURNED:
            scale = group_scale(tl.max(bits, axis=0), FMAX, POWER_OF_TWO)
            codes = codec.encode(x * scale[None, :], FMT, HARDWARE)
            tl.store(turned_ptr + turned_index, tl.trans(codes), mask=turned_inside)
            here = turned_scale_ptr + column * turned_scale_row + block_row * turned_scale_column
            tl.store(here, reciprocal(scale), mask=column < columns)


Coded = tuple[torch.Tensor, torch.Tensor]
"""Codes and scale_inv; the caller allocates both, so the scales may have the strides that a product wants."""


def quantize_groups(x: torch.Tensor, fmt: Format, plain: Coded | None, turned: Coded | None,
                    power_of_two: bool = True) -> None:  # fmt: skip
    """1x128 groups of contiguous `x` [M, K], from one read.

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
    rows, columns = x.shape
    codes, scale_inv = plain or turned or (x, x)
    turned_codes, turned_scale_inv = turned or plain or (x, x)
    if x.numel() and (plain or turned):
        with on_device(x):
            _block_kernel[(triton.cdiv(rows, 128), triton.cdiv(columns, 128))](
                x, codes.view(torch.uint8), scale_inv, turned_codes.view(torch.uint8), turned_scale_inv, rows, columns,
                scale_inv.stride(0), scale_inv.stride(1), turned_scale_inv.stride(0), turned_scale_inv.stride(1),
                codec.MODES[fmt.name], fmt.max, tiles, plain is not None, turned is not None, power_of_two,
                hardware_casts(x), num_warps=8, **LAUNCH,
            )  # fmt: skip
