"""Operands of stacked experts on a GPU: one launch casts the rows of all experts, whatever each was sent.

A grouped product takes one scale for each row along the axis that it sums over. So fprop and dgrad want rows, each
scaled by its own amax: a program holds whole rows, so one read measures and casts. The sum over rows that is left
(wgrad; a weight in the other direction) wants columns of each expert, transposed: a launch finds their amaxes, which
cross programs by an atomic maximum, and a launch casts by them. Where rows are cast anyway, that launch leaves the
amaxes of columns too.

    rows      [S, columns] as it lies                     scale_inv [S]
    columns   [columns, room], each expert's rows at a multiple of 16, zeros behind them; or, for weights
              [E, rows, columns], [E, columns, rows]      scale_inv [E, columns]

`table` tells where an expert's rows lie (`expert_tiles.py`); None: E experts of equal size, one after the other. The
rule for one scale is that of `numerics.row_scales`, to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats import FORMATS, Format
from ...numerics.dtypes import torch_dtype
from . import blocks, codec
from .expert_tiles import TILE_COLUMNS, TILE_ROWS, WARPS, count_tiles, tile_place
from .launch import LAUNCH, hardware_casts, on_device

WIDEST = 32768
"""Columns of the widest rows that one program holds."""

ELEMENTS_PER_WARP = 2048
"""Elements that a warp of a program that holds whole rows keeps in registers."""


@triton.jit
def _shown(bits, scale):
    """scale_inv; NaN where the amax is not finite, so that an overflow stays visible."""
    return tl.where(bits >= 0x7F800000, float("nan"), blocks.reciprocal(scale))


@triton.jit
def _rows_kernel(x_ptr, quantized_ptr, scale_inv_ptr, rows, columns, FMT: tl.constexpr, FMAX: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    first, row, column = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inner = row[:, None] * columns + column[None, :]
    is_row = first + row < rows
    inside = is_row[:, None] & (column < columns)[None, :]
    x = codec.load(x_ptr + first * columns + inner, inside)
    bits = tl.max(codec.magnitude_bits(x), axis=1)
    scale = blocks.group_scale(bits, FMAX, False)
    tl.store(quantized_ptr + first * columns + inner, codec.encode(x * scale[:, None], FMT, HARDWARE), mask=inside)
    tl.store(scale_inv_ptr + first + row, _shown(bits, scale), mask=is_row)


@triton.jit
def _rows_measured_kernel(x_ptr, quantized_ptr, scale_inv_ptr, amax_ptr, table_ptr, experts, rows_each, columns,
                          FMT: tl.constexpr, FMAX: tl.constexpr, EQUAL: tl.constexpr, EXPERTS: tl.constexpr,
                          TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                          HARDWARE: tl.constexpr):  # fmt: skip
    expert, first, last, number = tile_place(tl.program_id(0), table_ptr, experts, rows_each, EQUAL, EXPERTS, TILE_ROWS)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inner = row[:, None] * columns + column[None, :]
    is_column = column < columns
    largest = tl.zeros([COLUMNS], tl.int32)
    for step in range(TILE_ROWS // ROWS):
        start = first + number * TILE_ROWS + step * ROWS
        is_row = start + row < last
        inside = is_row[:, None] & is_column[None, :]
        x = codec.load(x_ptr + start * columns + inner, inside)
        magnitudes = codec.magnitude_bits(x)
        bits = tl.max(magnitudes, axis=1)
        largest = tl.maximum(largest, tl.max(magnitudes, axis=0))
        scale = blocks.group_scale(bits, FMAX, False)
        tl.store(quantized_ptr + start * columns + inner, codec.encode(x * scale[:, None], FMT, HARDWARE), mask=inside)
        tl.store(scale_inv_ptr + start + row, _shown(bits, scale), mask=is_row)
    _raise(amax_ptr + expert.to(tl.int64) * columns + column, largest, is_column)


@triton.jit
def _raise(amax_ptr, bits, inside):
    """Like `cast.raise_slot`, for a vector: only what is larger than at a first look becomes an atomic maximum."""
    slots = amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    largest = tl.minimum(bits, 0x7F800000)
    seen = tl.load(slots, mask=inside, other=0x7FFFFFFF, cache_modifier=".cg")
    tl.atomic_max(slots, largest, mask=inside & (largest > seen))


@triton.jit
def _column_amax_kernel(x_ptr, amax_ptr, table_ptr, experts, rows_each, columns, EQUAL: tl.constexpr,
                        EXPERTS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):  # fmt: skip
    expert, first, last, number = tile_place(tl.program_id(0), table_ptr, experts, rows_each, EQUAL, EXPERTS, TILE_ROWS)
    first += number * TILE_ROWS
    row, column = tl.arange(0, TILE_ROWS), tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (first + row < last)[:, None] & (column < columns)[None, :]
    x = codec.load(x_ptr + first * columns + row[:, None] * columns + column[None, :], inside)
    largest = tl.max(codec.magnitude_bits(x), axis=0)
    _raise(amax_ptr + expert.to(tl.int64) * columns + column, largest, column < columns)


@triton.jit
def _columns_kernel(x_ptr, transposed_ptr, scale_inv_ptr, amax_ptr, table_ptr, experts, rows_each, columns, room,
                    FMT: tl.constexpr, FMAX: tl.constexpr, EQUAL: tl.constexpr, EXPERTS: tl.constexpr,
                    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    expert, first, last, number = tile_place(tl.program_id(0), table_ptr, experts, rows_each, EQUAL, EXPERTS, TILE_ROWS)
    row, column = tl.arange(0, TILE_ROWS), tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_column = column < columns
    start = first + number * TILE_ROWS
    inside = (start + row < last)[:, None] & is_column[None, :]
    x = codec.load(x_ptr + start * columns + row[:, None] * columns + column[None, :], inside)
    places = expert.to(tl.int64) * columns + column
    bits = tl.load(amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + places, mask=is_column, other=0)
    scale = blocks.group_scale(bits, FMAX, False)
    quantized = codec.encode(x * scale[None, :], FMT, HARDWARE)
    if EQUAL:
        target, place = expert.to(tl.int64) * columns * room, number * TILE_ROWS + row
        is_place = place < room
    else:
        # An expert's rows begin at a multiple of 16; those up to the next expert's first are zeros, as is x there.
        target = tl.load(table_ptr + 2 * experts + expert - 1, mask=expert > 0, other=0).to(tl.int64)
        target = tl.multiple_of(target, 16)  # else bytes are stored one by one
        place = number * TILE_ROWS + row
        is_place = place < (last - first + 15) // 16 * 16
    inner = column.to(tl.int64)[:, None] * room + place[None, :]
    tl.store(transposed_ptr + target + inner, tl.trans(quantized), mask=is_column[:, None] & is_place[None, :])
    tl.store(scale_inv_ptr + places, _shown(bits, scale), mask=is_column & (number == 0))


Quantized = tuple[torch.Tensor, torch.Tensor]
"""Quantized values and scale_inv."""


def quantize_rows(x: torch.Tensor, fmt: Format) -> Quantized:
    """Contiguous `x` [..., rows, columns], columns <= WIDEST: quantized values like it, scale_inv [..., rows]."""
    columns = x.shape[-1]
    quantized = torch.empty(x.shape, dtype=torch_dtype(fmt), device=x.device)
    scale_inv = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        block, held, warps = _held(columns)
        with on_device(x):
            _rows_kernel[(triton.cdiv(scale_inv.numel(), held),)](
                x, quantized.view(torch.uint8), scale_inv, scale_inv.numel(), columns,
                codec.MODES[fmt.name], FORMATS[fmt.name].max, held, block, hardware_casts(x), num_warps=warps, **LAUNCH,
            )  # fmt: skip
    return quantized, scale_inv


def quantize_rows_measured(x: torch.Tensor, fmt: Format, table: torch.Tensor | None) -> tuple[Quantized, torch.Tensor]:
    """`quantize_rows`, and the amax of each column of each expert, fp32 [E, columns], from the same read.

    x  [S, columns] with a table, and rows of no expert get no quantized values; [E, rows, columns] without
    """
    experts, rows, columns = _sizes(x, table)
    quantized = torch.empty(x.shape, dtype=torch_dtype(fmt), device=x.device)
    scale_inv = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    amax = torch.zeros(experts, columns, dtype=torch.float32, device=x.device)
    if x.numel():
        block, held, warps = _held(columns)
        with on_device(x):
            _rows_measured_kernel[(count_tiles(x, table, TILE_ROWS),)](
                x, quantized.view(torch.uint8), scale_inv, amax, scale_inv if table is None else table, experts, rows,
                columns, codec.MODES[fmt.name], FORMATS[fmt.name].max, table is None, triton.next_power_of_2(experts),
                TILE_ROWS, held, block, hardware_casts(x), num_warps=warps, **LAUNCH,
            )  # fmt: skip
    return (quantized, scale_inv), amax


def column_amaxes(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """The amax of each column of each expert, fp32 [E, columns]; infinite where it is not finite, 0 without rows."""
    experts, rows, columns = _sizes(x, table)
    amax = torch.zeros(experts, columns, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            _column_amax_kernel[(count_tiles(x, table, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))](
                x, amax, amax if table is None else table, experts, rows, columns, table is None,
                triton.next_power_of_2(experts), TILE_ROWS, TILE_COLUMNS, num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
    return amax


def quantize_columns(
    x: torch.Tensor, amax: torch.Tensor, fmt: Format, table: torch.Tensor | None, room: int
) -> Quantized:
    """Columns of each expert by their amaxes [E, columns], transposed.

    room  with a table the rows of the layout that a product reads, a multiple of 16 and enough for all experts
    """
    experts, rows, columns = _sizes(x, table)
    shape = (experts, columns, rows) if table is None else (columns, room)
    quantized = torch.empty(shape, dtype=torch_dtype(fmt), device=x.device)
    scale_inv = torch.ones(experts, columns, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            _columns_kernel[(count_tiles(x, table, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))](
                x, quantized.view(torch.uint8), scale_inv, amax, amax if table is None else table, experts, rows,
                columns, shape[-1], codec.MODES[fmt.name], FORMATS[fmt.name].max, table is None,
                triton.next_power_of_2(experts), TILE_ROWS, TILE_COLUMNS, hardware_casts(x), num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
    return quantized, scale_inv


def _held(columns: int) -> tuple[int, int, int]:
    """(power of two for whole rows, rows that a program holds at once, its warps)."""
    block = triton.next_power_of_2(columns)
    held = max(1, 4096 // block)
    return block, held, min(16, max(4, block * held // ELEMENTS_PER_WARP))


def _sizes(x: torch.Tensor, table: torch.Tensor | None) -> tuple[int, int, int]:
    """(experts, rows of each or of all, columns)."""
    return (table.shape[1], *x.shape) if table is not None else tuple(x.shape)  # type: ignore[return-value]
