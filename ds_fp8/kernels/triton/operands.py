"""Operands of FP8 products on a GPU: one launch casts a matrix both ways round, measures it, and finds its scale.

Hopper multiplies FP8 only as row-major by column-major. So fprop and dgrad read a matrix as it lies and wgrad reads it
transposed: both are written here from one read of the 16-bit original. The caller allocates nothing and waits for
nothing, and the addresses of scales and amaxes never change, so a CUDA graph can replay it.

    delayed   the scale is known; the amax goes to its slot in the FP8 state
    current   a launch before leaves partial amaxes; every program derives the same scale from them
    block     1x128 groups both ways, or 128x128 tiles, with scales as `torch._scaled_mm` wants them (strides)
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...formats import FORMATS, Format
from ...numerics.dtypes import torch_dtype
from . import blocks, cast, codec
from .launch import Launch, hardware_casts, kind

TILE_ROWS, TILE_COLUMNS, WARPS = 64, 128, 4
"""Tile of one program; chosen by measurement (docs/gpu.md)."""

PARTS, PART_ELEMENTS, PART_WARPS = 512, 4096, 8
"""Programs that look for an amax, each leaving its own: nothing to zero before, no atomics."""

FROZEN, SHOWN = 8, 4
"""fp32 per column of the scales of a step: scale_inv where cuBLASLt reads it (at multiples of 16 bytes), then scale; at
SHOWN scale_inv once more, which becomes NaN when a guarded cast meets what is not finite.
"""


@triton.jit(do_not_specialize=["column"])
def _operand_kernel(x_ptr, quantized_ptr, transposed_ptr, frozen_ptr, amax_ptr, scale_inv_ptr, shown_ptr, rows, columns,
                    column, FMT: tl.constexpr, FMAX: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr,
                    MEASURE: tl.constexpr, CURRENT: tl.constexpr, GUARDED: tl.constexpr, KEPT: tl.constexpr,
                    EVEN: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, PARTS: tl.constexpr,
                    FROZEN: tl.constexpr, SHOWN: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    first_row, first_column = tl.program_id(0).to(tl.int64) * TILE_ROWS, tl.program_id(1).to(tl.int64) * TILE_COLUMNS
    row, place = tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    origin = first_row * columns + first_column
    inner = row[:, None] * columns + place[None, :]
    if EVEN:
        inside = tl.full([TILE_ROWS, TILE_COLUMNS], 1, tl.int1)
        transposed_inside = tl.full([TILE_COLUMNS, TILE_ROWS], 1, tl.int1)
    else:
        inside = (first_row + row[:, None] < rows) & (first_column + place[None, :] < columns)
        transposed_inside = (first_column + place[:, None] < columns) & (first_row + row[None, :] < rows)
    x = codec.load(x_ptr + origin + inner, inside)
    if CURRENT:
        parts = tl.load(amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, PARTS))
        bits = tl.max(parts, axis=0) + tl.zeros([1], tl.int32)
        scale = blocks.group_scale(bits, FMAX, False)
        if tl.program_id(0) + tl.program_id(1) == 0:
            scale_inv = blocks.reciprocal(scale)
            tl.store(scale_inv_ptr + tl.arange(0, 1), scale_inv)
            if GUARDED:
                tl.store(shown_ptr + tl.arange(0, 1), tl.where(bits >= 0x7F800000, float("nan"), scale_inv))
        quantized = codec.encode(x * scale[:, None], FMT, HARDWARE)
    else:
        quantized = codec.encode(x * tl.load(frozen_ptr + column * FROZEN + 1), FMT, HARDWARE)
        if KEPT and tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(scale_inv_ptr, tl.load(frozen_ptr + column * FROZEN))
    if STRAIGHT:
        quantized_bytes = quantized_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        tl.store(quantized_bytes + origin + inner, quantized, mask=inside)
    if TRANSPOSED:
        transposed_bytes = transposed_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        transposed_inner = place[:, None] * rows + row[None, :]
        tl.store(
            transposed_bytes + first_column * rows + first_row + transposed_inner,
            tl.trans(quantized),
            mask=transposed_inside,
        )
    if MEASURE:
        largest = tl.max(tl.max(codec.magnitude_bits(x), axis=1), axis=0)
        cast.raise_slot(amax_ptr + column, largest)
        if GUARDED and not CURRENT:
            tl.store(frozen_ptr + column * FROZEN + SHOWN, float("nan"), mask=largest >= 0x7F800000)


@triton.jit
def leave_part(x_ptr, parts_ptr, n, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    """The amax of this program's part of `x`, one of PARTS."""
    first = tl.program_id(0).to(tl.int64) * ELEMENTS
    largest = tl.zeros([ELEMENTS], tl.int32)
    while first < n:  # no range: the interpreter takes constants only
        index = first + tl.arange(0, ELEMENTS)
        largest = tl.maximum(largest, codec.magnitude_bits(codec.load(x_ptr + index, index < n)))
        first += PARTS * ELEMENTS
    found = tl.minimum(tl.max(largest, axis=0), 0x7F800000)  # NaN counts as inf
    tl.store(parts_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.program_id(0), found)


@triton.jit
def _parts_kernel(x_ptr, parts_ptr, n, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    leave_part(x_ptr, parts_ptr, n, PARTS, ELEMENTS)


Cast = tuple[torch.Tensor | None, torch.Tensor | None]
"""Quantized values [M, K] and transposed data [K, M]; None where not asked for."""


def cast_delayed(x: torch.Tensor, frozen: torch.Tensor, column: int, fmt: Format, pending: torch.Tensor | None, *,
                 straight: bool = True, transposed: bool = True, guarded: bool = False,
                 kept: torch.Tensor | None = None) -> Cast:  # fmt: skip
    """Cast contiguous `x` [..., K] (M rows in all) with a known scale.

    frozen   [columns of the fp8_state, FROZEN] fp32: the scales of a step, of which number `column` is used
    pending  [columns of the FP8 state] fp32: entry `column` is raised to the amax of `x`; None measures nothing
    guarded  `frozen[column, SHOWN]` becomes NaN if `x` is not finite; only with `pending`
    kept     fp32 at a multiple of 16 bytes, whose first element gets the scale_inv
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    quantized, transposed_out = empty(x, rows, columns, fmt, straight, transposed)
    launch = _launch(
        x.dtype, fmt.name, straight, transposed, pending is not None, False, guarded, kept is not None,
        x.data_ptr() % 16 == 0, rows % TILE_ROWS == 0 and columns % TILE_COLUMNS == 0, kind(rows), kind(columns),
        hardware_casts(x),
    )  # fmt: skip
    any_quantized = quantized if transposed_out is None else transposed_out
    assert any_quantized is not None, "a cast without quantized values"
    launch(
        (-(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)),
        (x, any_quantized if quantized is None else quantized, any_quantized, frozen,
         frozen if pending is None else pending, frozen if kept is None else kept, frozen),
        rows, columns, column,
    )  # fmt: skip
    return quantized, transposed_out


def cast_current(
    x: torch.Tensor,
    fmt: Format,
    *,
    straight: bool = True,
    transposed: bool = True,
    guarded: bool = False,
    kept: torch.Tensor | None = None,
) -> tuple[Cast, torch.Tensor, torch.Tensor]:
    """Cast contiguous `x` [..., K] (M rows in all) by the scale of its own amax; returns quantized values and two
    scale_inv, fp32 [1].

    guarded  the second scale_inv is NaN if `x` is not finite; otherwise both are the same tensor
    kept     fp32, one element at a multiple of 16 bytes, that the first scale_inv shall be
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    is_aligned, device = x.data_ptr() % 16 == 0, x.device
    quantized, transposed_out = empty(x, rows, columns, fmt, straight, transposed)
    parts = torch.empty(PARTS, dtype=torch.float32, device=device)
    scale_inv = torch.empty(1, dtype=torch.float32, device=device) if kept is None else kept
    shown = torch.empty(1, dtype=torch.float32, device=device) if guarded else scale_inv
    n = rows * columns
    _parts_launch(x.dtype, is_aligned, kind(n), n < 2**31)((PARTS, 1), (x, parts), n)
    launch = _launch(
        x.dtype, fmt.name, straight, transposed, False, True, guarded, False, is_aligned,
        rows % TILE_ROWS == 0 and columns % TILE_COLUMNS == 0, kind(rows), kind(columns), hardware_casts(x),
    )  # fmt: skip
    any_quantized = quantized if transposed_out is None else transposed_out
    assert any_quantized is not None, "a cast without quantized values"
    launch(
        (-(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)),
        (x, any_quantized if quantized is None else quantized, any_quantized, parts, parts, scale_inv, shown),
        rows, columns, 0,
    )  # fmt: skip
    return (quantized, transposed_out), scale_inv, shown


@functools.cache
def _launch(dtype: torch.dtype, fmt: str, straight: bool, transposed: bool, measure: bool, current: bool, guarded: bool,
            kept: bool, is_aligned: bool, even: bool, rows: int, columns: int, hardware: bool) -> Launch:  # fmt: skip
    """The launch for one set of everything by which Triton compiles another kernel."""
    constants = (
        codec.MODES[fmt], FORMATS[fmt].max, straight, transposed, measure, current, guarded, kept, even, TILE_ROWS,
        TILE_COLUMNS, PARTS, FROZEN, SHOWN, hardware,
    )  # fmt: skip
    return Launch(_operand_kernel, constants, num_warps=WARPS)


@functools.cache
def _parts_launch(dtype: torch.dtype, is_aligned: bool, n: int, is_short: bool) -> Launch:
    return Launch(_parts_kernel, (PARTS, PART_ELEMENTS), num_warps=PART_WARPS)


def empty(x: torch.Tensor, rows: int, columns: int, fmt: Format, straight: bool, transposed: bool) -> Cast:
    dtype, device = torch_dtype(fmt), x.device
    quantized = torch.empty(rows, columns, dtype=dtype, device=device) if straight else None
    return quantized, torch.empty(columns, rows, dtype=dtype, device=device) if transposed else None


def cast_groups(
    x: torch.Tensor, fmt: Format, *, straight: bool = True, transposed: bool = True
) -> tuple[blocks.Quantized | None, blocks.Quantized | None]:
    """1x128 groups of `x` [..., K] along K, and along its M rows transposed; scale_inv with the outer axis
    contiguous.
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    quantized, transposed_out = empty(x, rows, columns, fmt, straight, transposed)
    found = None if quantized is None else (quantized, _scales(columns // 128, rows, x.device).t())
    found_transposed = None if transposed_out is None else (transposed_out, _scales(rows // 128, columns, x.device).t())
    blocks.quantize_groups(x, fmt, found, found_transposed)
    return found, found_transposed


def cast_tiles(
    x: torch.Tensor, fmt: Format, *, transposed: bool = True
) -> tuple[blocks.Quantized, blocks.Quantized | None]:
    """128x128 tiles of `x` [N, K] and of its transpose, scale_inv [N / 128, K / 128] with padded rows."""
    quantized, transposed_out = empty(x, x.shape[0], x.shape[1], fmt, True, transposed)
    rows, columns = x.shape[0] // 128, x.shape[1] // 128
    assert quantized is not None
    straight = (quantized, _scales(rows, columns, x.device))
    blocks.quantize_tiles(x, fmt, straight)
    if transposed_out is None:
        return straight, None
    cast.turn(quantized.t(), transposed_out)
    found_transposed = (transposed_out, _scales(columns, rows, x.device))
    found_transposed[1].copy_(straight[1].t())
    return straight, found_transposed


def _scales(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """fp32 [rows, columns] whose rows begin at multiples of 16 bytes, as cuBLASLt wants."""
    return torch.empty((rows, (columns + 3) // 4 * 4), dtype=torch.float32, device=device)[:, :columns]
