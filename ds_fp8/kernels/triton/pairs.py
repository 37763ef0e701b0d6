"""Input [M, K] and weight [N, K] of one product, cast together: one launch under delayed scaling, two under current.

Small layers have short casts: the weight of a layer of width 1024 keeps a Hopper busy for less time than a launch
takes, and the host waits for each. The programs are those of `operands` and `weights`, and so is every bit; the first
axis of the grid goes over the row tiles of the input, then over those of the weight.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...formats import FORMATS, Format
from . import blocks, cast, codec, operands, weights
from .launch import Launch, hardware_casts, kind
from .operands import FROZEN, PART_WARPS, TILE_COLUMNS, TILE_ROWS, WARPS, Cast, empty


@triton.jit(do_not_specialize=["column", "weight_column"])
def _delayed_kernel(x_ptr, quantized_ptr, transposed_ptr, weight_ptr, weight_quantized_ptr, weight_transposed_ptr,
                    frozen_ptr, pending_ptr, own_ptr, kept_ptr, scale_inv_ptr, rows, weight_rows, columns, column,
                    weight_column, FMT: tl.constexpr, FMAX: tl.constexpr, LIMIT: tl.constexpr,
                    MARGIN_FACTOR: tl.constexpr, TRANSPOSED: tl.constexpr, WEIGHT_TRANSPOSED: tl.constexpr,
                    MEASURE: tl.constexpr, KEPT: tl.constexpr, EVEN: tl.constexpr, WEIGHT_EVEN: tl.constexpr,
                    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FROZEN: tl.constexpr,
                    HARDWARE: tl.constexpr):  # fmt: skip
    tile, first_column = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * TILE_COLUMNS
    tiles = tl.cdiv(rows, TILE_ROWS)
    if tile < tiles:
        scale = tl.load(frozen_ptr + column * FROZEN + 1)
        bits = weights.cast_tile(
            x_ptr, quantized_ptr, transposed_ptr, scale, tile * TILE_ROWS, first_column, rows, columns, FMT, True,
            TRANSPOSED, EVEN, TILE_ROWS, TILE_COLUMNS, HARDWARE,
        )  # fmt: skip
        if KEPT and tile + first_column == 0:
            tl.store(kept_ptr, tl.load(frozen_ptr + column * FROZEN))
        if MEASURE:
            cast.raise_slot(pending_ptr + column, bits)
    else:
        weights.weight_tile(
            weight_ptr, weight_quantized_ptr, weight_transposed_ptr, frozen_ptr, pending_ptr, own_ptr, scale_inv_ptr,
            (tile - tiles) * TILE_ROWS, first_column, weight_rows, columns, weight_column,
            (tl.num_programs(0) - tiles) * tl.num_programs(1), FMT, FMAX, LIMIT, MARGIN_FACTOR, True,
            WEIGHT_TRANSPOSED, MEASURE, WEIGHT_EVEN, TILE_ROWS, TILE_COLUMNS, FROZEN, HARDWARE,
        )  # fmt: skip


@triton.jit
def _parts_kernel(x_ptr, weight_ptr, parts_ptr, n, weight_n, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    if tl.program_id(1) == 0:
        operands.leave_part(x_ptr, parts_ptr, n, PARTS, ELEMENTS)
    else:
        operands.leave_part(weight_ptr, parts_ptr + PARTS, weight_n, PARTS, ELEMENTS)


@triton.jit
def _own_scale(parts_ptr, scale_inv_ptr, is_first, FMAX: tl.constexpr, PARTS: tl.constexpr):
    parts = tl.load(parts_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, PARTS))
    scale = blocks.group_scale(tl.max(parts, axis=0) + tl.zeros([1], tl.int32), FMAX, False)
    if is_first:
        tl.store(scale_inv_ptr + tl.arange(0, 1), blocks.reciprocal(scale))
    return tl.max(scale, axis=0)


@triton.jit
def _current_kernel(x_ptr, quantized_ptr, transposed_ptr, weight_ptr, weight_quantized_ptr, weight_transposed_ptr,
                    parts_ptr, scale_inv_ptr, weight_scale_inv_ptr, rows, weight_rows, columns, FMT: tl.constexpr,
                    FMAX: tl.constexpr, TRANSPOSED: tl.constexpr, WEIGHT_TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
                    WEIGHT_EVEN: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, PARTS: tl.constexpr,
                    HARDWARE: tl.constexpr):  # fmt: skip
    tile, first_column = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * TILE_COLUMNS
    tiles = tl.cdiv(rows, TILE_ROWS)
    if tile < tiles:
        scale = _own_scale(parts_ptr, scale_inv_ptr, tile + first_column == 0, FMAX, PARTS)
        weights.cast_tile(
            x_ptr, quantized_ptr, transposed_ptr, scale, tile * TILE_ROWS, first_column, rows, columns, FMT, True,
            TRANSPOSED, EVEN, TILE_ROWS, TILE_COLUMNS, HARDWARE,
        )  # fmt: skip
    else:
        tile -= tiles
        scale = _own_scale(parts_ptr + PARTS, weight_scale_inv_ptr, tile + first_column == 0, FMAX, PARTS)
        weights.cast_tile(
            weight_ptr, weight_quantized_ptr, weight_transposed_ptr, scale, tile * TILE_ROWS, first_column, weight_rows,
            columns, FMT, True, WEIGHT_TRANSPOSED, WEIGHT_EVEN, TILE_ROWS, TILE_COLUMNS, HARDWARE,
        )  # fmt: skip


def cast_delayed(x: torch.Tensor, weight: torch.Tensor, frozen: torch.Tensor, columns: tuple[int, int], fmt: Format,
                 pending: torch.Tensor | None, own: torch.Tensor, scale_inv: torch.Tensor, *, margin: int,
                 transposed: tuple[bool, bool], kept: torch.Tensor | None = None) -> tuple[Cast, Cast]:  # fmt: skip
    """`operands.cast_delayed` of contiguous `x` [..., K] and `weights.cast_weight` of `weight` [N, K], of one dtype.

    columns     those of input and weight in `frozen`, `pending` and `own`
    transposed  whether input and weight are wanted as [K, M] and [K, N], too
    """
    made, any_made, shape, common = _made(x, weight, fmt, transposed)
    launch = _delayed_launch(*common, margin, pending is not None, kept is not None)
    tensors = (frozen, frozen if pending is None else pending, own, frozen if kept is None else kept, scale_inv)
    launch(_grid(*shape), (*any_made, *tensors), *shape, *columns)
    return made


def cast_current(x: torch.Tensor, weight: torch.Tensor, fmt: Format, *, transposed: tuple[bool, bool],
                 kept: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
                 ) -> tuple[tuple[Cast, Cast], tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """`operands.cast_current` of contiguous `x` [..., K] and of `weight` [N, K], of one dtype; with their scale_inv,
    fp32 [1], which are `kept` where that is given.
    """
    made, any_made, shape, common = _made(x, weight, fmt, transposed)
    parts = torch.empty(2, operands.PARTS, dtype=torch.float32, device=x.device)
    scale_inv = tuple(torch.empty(1, dtype=torch.float32, device=x.device) if one is None else one for one in kept)
    n, weight_n = x.numel(), weight.numel()
    is_short = n < 2**31 and weight_n < 2**31
    launch = _parts_launch(
        x.dtype, x.data_ptr() % 16 == 0, weight.data_ptr() % 16 == 0, kind(n), kind(weight_n), is_short
    )
    launch((operands.PARTS, 2), (x, weight, parts), n, weight_n)
    _current_launch(*common)(_grid(*shape), (*any_made, parts, *scale_inv), *shape)
    return made, scale_inv  # type: ignore[return-value]


def _made(x: torch.Tensor, weight: torch.Tensor, fmt: Format, transposed: tuple[bool, bool]):
    """Memory for the results; kernels' first arguments; (M, N, K); and by what Triton compiles another kernel."""
    assert x.dtype == weight.dtype, "one kernel reads both"
    columns = weight.shape[1]
    rows, weight_rows = x.numel() // columns, weight.shape[0]
    made = (
        empty(x, rows, columns, fmt, True, transposed[0]),
        empty(weight, weight_rows, columns, fmt, True, transposed[1]),
    )
    given: list[torch.Tensor] = []
    for source, (quantized, back) in zip((x, weight), made, strict=True):
        given += [source, quantized, quantized if back is None else back]  # type: ignore[list-item]
    whole = columns % TILE_COLUMNS == 0
    common = (
        x.dtype, fmt.name, transposed, x.data_ptr() % 16 == 0, weight.data_ptr() % 16 == 0,
        rows % TILE_ROWS == 0 and whole, weight_rows % TILE_ROWS == 0 and whole, kind(rows), kind(weight_rows),
        kind(columns), hardware_casts(x),
    )  # fmt: skip
    return made, given, (rows, weight_rows, columns), common


def _grid(rows: int, weight_rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // TILE_ROWS) + -(-weight_rows // TILE_ROWS), -(-columns // TILE_COLUMNS)


@functools.cache
def _delayed_launch(dtype: torch.dtype, fmt: str, transposed: tuple[bool, bool], is_aligned: bool,
                    weight_is_aligned: bool, even: bool, weight_even: bool, rows: int, weight_rows: int, columns: int,
                    hardware: bool, margin: int, measure: bool, kept: bool) -> Launch:  # fmt: skip
    """The launch for one set of everything by which Triton compiles another kernel."""
    fmax = FORMATS[fmt].max
    constants = (
        codec.MODES[fmt], fmax, weights.OUTGROWN * fmax, 2.0**margin, *transposed, measure, kept, even, weight_even,
        TILE_ROWS, TILE_COLUMNS, FROZEN, hardware,
    )  # fmt: skip
    return Launch(_delayed_kernel, constants, num_warps=WARPS)


@functools.cache
def _current_launch(dtype: torch.dtype, fmt: str, transposed: tuple[bool, bool], is_aligned: bool,
                    weight_is_aligned: bool, even: bool, weight_even: bool, rows: int, weight_rows: int, columns: int,
                    hardware: bool) -> Launch:  # fmt: skip
    constants = (
        codec.MODES[fmt], FORMATS[fmt].max, *transposed, even, weight_even, TILE_ROWS, TILE_COLUMNS, operands.PARTS,
        hardware,
    )  # fmt: skip
    return Launch(_current_kernel, constants, num_warps=WARPS)


@functools.cache
def _parts_launch(dtype: torch.dtype, is_aligned: bool, weight_is_aligned: bool, n: int, weight_n: int,
                  is_short: bool) -> Launch:  # fmt: skip
    return Launch(_parts_kernel, (operands.PARTS, operands.PART_ELEMENTS), num_warps=PART_WARPS)
