"""Casts of weights under delayed scaling: by the scale of the step, or by the weight's own where a script has written.

A scale of the step fits what the last step left. A script may write far larger values in between (averaged weights
swapped in, `weight.data.mul_(16)`), and nothing on the host tells. So the cast measures the weight, and its last
program looks: where the amax is more than twice what the scale can take, that program casts all of it once more by its
own amax. What is usual costs one atomic addition per program; what is rare costs milliseconds, and is right.

The amax of a launch and the count of programs that are done lie in `own`, which the last program zeroes again.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...formats import FORMATS, Format
from . import cast, codec
from .launch import Launch, hardware_casts, kind
from .operands import FROZEN, TILE_COLUMNS, TILE_ROWS, WARPS, Cast, empty

OUTGROWN = 2.0
"""How many times its scale's range a weight must have for its own; an optimizer step does not double an amax."""

ELEMENTS, SCALE_WARPS = 8192, 8


@triton.jit
def cast_tile(x_ptr, quantized_ptr, transposed_ptr, scale, first_row, first_column, rows, columns, FMT: tl.constexpr,
              STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, TILE_ROWS: tl.constexpr,
              TILE_COLUMNS: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """Cast one tile; returns the bits of its amax."""
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
    quantized = codec.encode(x * scale, FMT, HARDWARE)
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
    return tl.max(tl.max(codec.magnitude_bits(x), axis=1), axis=0)


@triton.jit
def _last(own_ptr, programs):
    """(whether this program is the last one, bits of the amax of all; both slots are zero again then)."""
    tl.debug_barrier()  # all that this program has stored comes before its count
    done = tl.atomic_add(own_ptr + 1, 1)
    is_last = done == programs - 1
    bits = tl.atomic_xchg(own_ptr, 0, mask=is_last)
    tl.atomic_xchg(own_ptr + 1, 0, mask=is_last)
    return is_last, bits


@triton.jit
def _own_scale(bits, FMAX: tl.constexpr, MARGIN_FACTOR: tl.constexpr):
    """numerics.scaling.scale_from_amax for the bits of a positive finite amax."""
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.div_rn(FMAX + amax * 0.0, amax), MARGIN_FACTOR + amax * 0.0)
    return tl.minimum(scale.to(tl.int32, bitcast=True), 0x7F7FFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _is_outgrown(bits, scale, LIMIT: tl.constexpr):
    return (bits > 0) & (bits < 0x7F800000) & (bits.to(tl.float32, bitcast=True) * scale > LIMIT)


@triton.jit
def weight_tile(x_ptr, quantized_ptr, transposed_ptr, frozen_ptr, pending_ptr, own_ptr, scale_inv_ptr, first_row,
                first_column, rows, columns, column, programs, FMT: tl.constexpr, FMAX: tl.constexpr,
                LIMIT: tl.constexpr, MARGIN_FACTOR: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr,
                MEASURE: tl.constexpr, EVEN: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
                FROZEN: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """One of `programs` that cast a weight; the last of them sees to it that the scale fits."""
    scale = tl.load(frozen_ptr + column * FROZEN + 1)
    bits = cast_tile(
        x_ptr, quantized_ptr, transposed_ptr, scale, first_row, first_column, rows, columns, FMT, STRAIGHT, TRANSPOSED,
        EVEN, TILE_ROWS, TILE_COLUMNS, HARDWARE,
    )  # fmt: skip
    own_ptr += column * 2
    cast.raise_slot(own_ptr, bits)
    is_last, bits = _last(own_ptr, programs)
    if is_last:
        if MEASURE:
            cast.raise_slot(pending_ptr + column, bits)
        scale_inv = tl.load(frozen_ptr + column * FROZEN)
        if _is_outgrown(bits, scale, LIMIT):
            scale = _own_scale(bits, FMAX, MARGIN_FACTOR)
            scale_inv = tl.div_rn(1.0 + scale * 0.0, scale)
            at = tl.zeros([], tl.int64)
            while at < rows:  # no range: the interpreter takes constants only
                start = tl.zeros([], tl.int64)
                while start < columns:
                    cast_tile(
                        x_ptr, quantized_ptr, transposed_ptr, scale, at, start, rows, columns, FMT, STRAIGHT,
                        TRANSPOSED, EVEN, TILE_ROWS, TILE_COLUMNS, HARDWARE,
                    )  # fmt: skip
                    start += TILE_COLUMNS
                at += TILE_ROWS
        tl.store(scale_inv_ptr, scale_inv)


@triton.jit(do_not_specialize=["column"])
def _weight_kernel(x_ptr, quantized_ptr, transposed_ptr, frozen_ptr, pending_ptr, own_ptr, scale_inv_ptr, rows, columns,
                   column, FMT: tl.constexpr, FMAX: tl.constexpr, LIMIT: tl.constexpr, MARGIN_FACTOR: tl.constexpr,
                   STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, MEASURE: tl.constexpr, EVEN: tl.constexpr,
                   TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FROZEN: tl.constexpr,
                   HARDWARE: tl.constexpr):  # fmt: skip
    first_row, first_column = tl.program_id(0).to(tl.int64) * TILE_ROWS, tl.program_id(1).to(tl.int64) * TILE_COLUMNS
    weight_tile(
        x_ptr, quantized_ptr, transposed_ptr, frozen_ptr, pending_ptr, own_ptr, scale_inv_ptr, first_row, first_column,
        rows, columns, column, tl.num_programs(0) * tl.num_programs(1), FMT, FMAX, LIMIT, MARGIN_FACTOR, STRAIGHT,
        TRANSPOSED, MEASURE, EVEN, TILE_ROWS, TILE_COLUMNS, FROZEN, HARDWARE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["column"])
def _scale_kernel(x_ptr, frozen_ptr, own_ptr, scale_ptr, n, column, FMAX: tl.constexpr, LIMIT: tl.constexpr,
                  MARGIN_FACTOR: tl.constexpr, ELEMENTS: tl.constexpr, FROZEN: tl.constexpr):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = codec.load(x_ptr + index, index < n)
    own_ptr += column * 2
    cast.raise_slot(own_ptr, tl.max(codec.magnitude_bits(x), axis=0))
    is_last, bits = _last(own_ptr, tl.num_programs(0))
    if is_last:
        scale = tl.load(frozen_ptr + column * FROZEN + 1)
        if _is_outgrown(bits, scale, LIMIT):
            scale = _own_scale(bits, FMAX, MARGIN_FACTOR)
        tl.store(scale_ptr, scale)


def cast_weight(weight: torch.Tensor, frozen: torch.Tensor, column: int, fmt: Format, pending: torch.Tensor | None,
                own: torch.Tensor, scale_inv: torch.Tensor, *, margin: int, straight: bool = True,
                transposed: bool = True) -> Cast:  # fmt: skip
    """Cast contiguous `weight` [N, K] by the scale of the step or, where it has outgrown that, by its own.

    frozen, pending  as those of `operands.cast_delayed`
    own              [columns, 2] int32, zeros
    scale_inv        0-d fp32 at a multiple of 16 bytes: gets that of the scale used
    """
    rows, columns = weight.shape
    quantized, transposed_out = empty(weight, rows, columns, fmt, straight, transposed)
    any_quantized = quantized if transposed_out is None else transposed_out
    assert any_quantized is not None, "a cast without quantized values"
    launch = _weight_launch(
        weight.dtype, fmt.name, margin, straight, transposed, pending is not None, weight.data_ptr() % 16 == 0,
        rows % TILE_ROWS == 0 and columns % TILE_COLUMNS == 0, kind(rows), kind(columns), hardware_casts(weight),
    )  # fmt: skip
    launch(
        (-(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)),
        (weight, any_quantized if quantized is None else quantized, any_quantized, frozen,
         frozen if pending is None else pending, own, scale_inv),
        rows, columns, column,
    )  # fmt: skip
    return quantized, transposed_out


def weight_scale(weight: torch.Tensor, frozen: torch.Tensor, column: int, fmt: Format, own: torch.Tensor, *,
                 margin: int) -> torch.Tensor:  # fmt: skip
    """fp32 [1]: the scale that `cast_weight` takes, for somebody who casts himself (Transformer Engine)."""
    scale, n = torch.empty(1, dtype=torch.float32, device=weight.device), weight.numel()
    launch = _scale_launch(weight.dtype, fmt.name, margin, weight.data_ptr() % 16 == 0, kind(n), n < 2**31)
    launch((-(-n // ELEMENTS), 1), (weight, frozen, own, scale), n, column)
    return scale


@functools.cache
def _weight_launch(dtype: torch.dtype, fmt: str, margin: int, straight: bool, transposed: bool, measure: bool,
                   is_aligned: bool, even: bool, rows: int, columns: int, hardware: bool) -> Launch:  # fmt: skip
    """The launch for one set of everything by which Triton compiles another kernel."""
    fmax = FORMATS[fmt].max
    constants = (
        codec.MODES[fmt], fmax, OUTGROWN * fmax, 2.0**margin, straight, transposed, measure, even, TILE_ROWS,
        TILE_COLUMNS, FROZEN, hardware,
    )  # fmt: skip
    return Launch(_weight_kernel, constants, num_warps=WARPS)


@functools.cache
def _scale_launch(dtype: torch.dtype, fmt: str, margin: int, is_aligned: bool, n: int, is_short: bool) -> Launch:
    fmax = FORMATS[fmt].max
    return Launch(_scale_kernel, (fmax, OUTGROWN * fmax, 2.0**margin, ELEMENTS, FROZEN), num_warps=SCALE_WARPS)
