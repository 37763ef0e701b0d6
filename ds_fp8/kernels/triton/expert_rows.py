"""Rows of stacked experts beside their products: biases added and summed by expert, zeros where no expert wrote.

A grouped product writes the rows of its experts only: what lies behind the last expert's rows, and the gradient of an
expert that was sent none, is memory as it was found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import codec
from .expert_tiles import TILE_COLUMNS, TILE_ROWS, WARPS, count_tiles, tile_place
from .launch import LAUNCH, on_device


@triton.jit
def _tail_kernel(out_ptr, end_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the rows behind the last expert's."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    if first + ROWS > tl.load(end_ptr):
        row = first + tl.arange(0, ROWS)
        is_row = (row < rows) & (row >= tl.load(end_ptr))
        start = 0
        while start < columns:
            column = start + tl.arange(0, COLUMNS)
            zeros = tl.zeros([ROWS, COLUMNS], out_ptr.dtype.element_ty)
            inside = is_row[:, None] & (column < columns)[None, :]
            tl.store(out_ptr + row[:, None] * columns + column[None, :], zeros, mask=inside)
            start += COLUMNS


@triton.jit
def _empty_kernel(out_ptr, ends_ptr, numel, STEP: tl.constexpr):
    """Zeros in the matrices [numel] of experts without rows."""
    expert = tl.program_id(0)
    before = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    if tl.load(ends_ptr + expert) == before:
        start = tl.program_id(1) * STEP
        while start < numel:
            place = start + tl.arange(0, STEP)
            zeros = tl.zeros([STEP], out_ptr.dtype.element_ty)
            tl.store(out_ptr + expert.to(tl.int64) * numel + place, zeros, mask=place < numel)
            start += tl.num_programs(1) * STEP


@triton.jit
def _add_rows_kernel(x_ptr, bias_ptr, out_ptr, table_ptr, experts, columns, EXPERTS: tl.constexpr,
                     TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):  # fmt: skip
    expert, first, last, number = tile_place(tl.program_id(0), table_ptr, experts, 0, False, EXPERTS, TILE_ROWS)
    first += number * TILE_ROWS
    row, column = tl.arange(0, TILE_ROWS), tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_column = column < columns
    inside = (first + row < last)[:, None] & is_column[None, :]
    inner = first * columns + row[:, None] * columns + column[None, :]
    bias = codec.load(bias_ptr + expert.to(tl.int64) * columns + column, is_column)
    if x_ptr.dtype.element_ty == tl.bfloat16 and bias_ptr.dtype.element_ty == tl.float32:
        bias = (codec.bf16_bits(bias) << 16).to(tl.float32, bitcast=True)
    codec.store(out_ptr + inner, codec.load(x_ptr + inner, inside) + bias[None, :], inside)


@triton.jit
def _sum_rows_kernel(x_ptr, out_ptr, table_ptr, experts, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 sums of each expert's rows, in an order that depends on the number of its rows only."""
    expert, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(table_ptr + experts + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    last = tl.load(table_ptr + experts + expert).to(tl.int64)
    is_column = column < columns
    row, total = tl.arange(0, ROWS), tl.zeros([ROWS, COLUMNS], tl.float32)
    while start < last:
        inside = (start + row < last)[:, None] & is_column[None, :]
        total += codec.load(x_ptr + start * columns + row[:, None] * columns + column[None, :], inside)
        start += ROWS
    tl.store(out_ptr + expert.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=is_column)


def zero_tail(out: torch.Tensor, end: torch.Tensor) -> None:
    """Zeros in rows `end` (one int32, on the device) and later of contiguous `out` [rows, columns]."""
    rows, columns = out.shape
    if out.numel():
        with on_device(out):
            _tail_kernel[(triton.cdiv(rows, 16),)](out, end, rows, columns, 16, 256, **LAUNCH)


def zero_experts(out: torch.Tensor, ends: torch.Tensor) -> None:
    """Zeros in `out` [E, ., .], contiguous, where an expert has no rows: `ends` [E] int32 are the sums of rows."""
    if out.numel():
        numel = out[0].numel()
        with on_device(out):
            _empty_kernel[(out.shape[0], min(64, triton.cdiv(numel, 4096)))](out, ends, numel, 4096, **LAUNCH)


def add_rows(x: torch.Tensor, bias: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Contiguous `x` [S, columns] plus the row of `bias` [E, columns] of each one's expert; zeros for rows of none."""
    out = torch.empty_like(x)
    if x.numel():
        rows, columns = x.shape
        with on_device(x):
            _add_rows_kernel[(count_tiles(x, table, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))](
                x, bias, out, table, table.shape[1], columns, triton.next_power_of_2(table.shape[1]), TILE_ROWS,
                TILE_COLUMNS, num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
            _tail_kernel[(triton.cdiv(rows, 16),)](out, table[1, -1:], rows, columns, 16, 256, **LAUNCH)
    return out


def sum_rows(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sums of each expert's rows of contiguous `x` [S, columns]: fp32 [E, columns], 0 without rows."""
    columns = x.shape[1]
    out = torch.empty(table.shape[1], columns, dtype=torch.float32, device=x.device)
    if out.numel():
        with on_device(x):
            _sum_rows_kernel[(table.shape[1], triton.cdiv(columns, 64))](
                x, out, table, table.shape[1], columns, 32, 64, num_warps=4, **LAUNCH
            )
    return out
