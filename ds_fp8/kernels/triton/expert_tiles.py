"""Which rows a program of stacked experts takes: tiles of rows that never reach from one expert into the next.

`table` [3, E] int32 tells where an expert's rows lie: the sums up to and with each expert of tiles of TILE_ROWS rows,
of rows, and of rows rounded up to 16. It stays on the device, so nobody waits for the numbers that a router has made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ROWS, TILE_COLUMNS, WARPS = 128, 64, 4
"""Tile of one program, and its warps."""


@triton.jit
def tile_place(tile, table_ptr, experts, rows_each, EQUAL: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Whose tile number `tile` is: (expert, its first row, row behind its last, number within the expert); an empty
    tile of expert 0 behind the last.
    """
    if EQUAL:
        each = (rows_each + ROWS - 1) // ROWS
        expert, number = tile // each, tile % each
        first = expert.to(tl.int64) * rows_each
        last = first + rows_each
    else:
        place = tl.arange(0, EXPERTS)
        known = place < experts
        ends = tl.load(table_ptr + place, mask=known, other=0x7FFFFFFF)
        expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
        exists = expert < experts
        expert = tl.where(exists, expert, 0)
        before = expert > 0
        number = tile - tl.load(table_ptr + expert - 1, mask=before, other=0)
        first = tl.load(table_ptr + experts + expert - 1, mask=before, other=0).to(tl.int64)
        last = tl.load(table_ptr + experts + expert).to(tl.int64)
        last = tl.where(exists, last, first)
        number = tl.where(exists, number, 1)
    return expert, first, last, number


def count_tiles(x: torch.Tensor, table: torch.Tensor | None, rows: int) -> int:
    """Programs that suffice for any distribution of the rows of `x`, in tiles of `rows` of them."""
    if table is None:
        return x.shape[0] * triton.cdiv(x.shape[1], rows)
    return triton.cdiv(x.shape[0], rows) + table.shape[1]
