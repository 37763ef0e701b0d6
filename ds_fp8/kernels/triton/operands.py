"""Operands of FP8 products on a GPU: one launch casts a matrix both ways round, measures it, and finds its scale.

Hopper multiplies FP8 only as row-major by column-major. So fprop and dgrad read a matrix as it lies and wgrad reads it
transposed: both are written here from one read of the 16-bit original. The caller allocates nothing and waits for
nothing, and the addresses of scales and amaxes never change, so a CUDA graph can replay it.

    delayed   the scale is known; the amax goes to its slot in the scale book
    current   a launch before measures; every program derives the same scale from the amax
    block     1x128 groups both ways, or 128x128 tiles, with scales as `torch._scaled_mm` wants them (strides)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats import Format
from ...numerics.dtypes import torch_dtype
from . import blocks, cast, codec
from .launch import hardware_casts, on_device, start

TILE_ROWS, TILE_COLUMNS, WARPS = 64, 128, 4
"""Tile of one program; chosen by measurement (docs/gpu.md)."""


@triton.jit
def _operand_kernel(x_ptr, scale_ptr, codes_ptr, turned_ptr, amax_ptr, scale_inv_ptr, rows, columns, FMT: tl.constexpr,
                    FMAX: tl.constexpr, PLAIN: tl.constexpr, TURNED: tl.constexpr, MEASURE: tl.constexpr,
                    CURRENT: tl.constexpr, EVEN: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
                    HARDWARE: tl.constexpr):  # fmt: skip
    first_row, first_column = tl.program_id(0).to(tl.int64) * TILE_ROWS, tl.program_id(1).to(tl.int64) * TILE_COLUMNS
    row, column = tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    origin = first_row * columns + first_column
    inner = row[:, None] * columns + column[None, :]
    if EVEN:
        inside = tl.full([TILE_ROWS, TILE_COLUMNS], 1, tl.int1)
        turned_inside = tl.full([TILE_COLUMNS, TILE_ROWS], 1, tl.int1)
    else:
        inside = (first_row + row[:, None] < rows) & (first_column + column[None, :] < columns)
        turned_inside = (first_column + column[:, None] < columns) & (first_row + row[None, :] < rows)
    x = codec.load(x_ptr + origin + inner, inside)
    if CURRENT:
        bits = tl.load(amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, 1))
        scale = blocks.group_scale(bits, FMAX, False)
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(scale_inv_ptr + tl.arange(0, 1), blocks.reciprocal(scale))
        codes = codec.encode(x * scale[:, None], FMT, HARDWARE)
    else:
        codes = codec.encode(x * tl.load(scale_ptr), FMT, HARDWARE)
    if PLAIN:
        codes_bytes = codes_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        tl.store(codes_bytes + origin + inner, codes, mask=inside)
    if TURNED:
        turned_bytes = turned_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        turned_inner = column[:, None] * rows + row[None, :]
        tl.store(turned_bytes + first_column * rows + first_row + turned_inner, tl.trans(codes), mask=turned_inside)
    if MEASURE:
        cast.raise_slot(amax_ptr, tl.max(tl.max(codec.magnitude_bits(x), axis=1), axis=0))


Cast = tuple[torch.Tensor | None, torch.Tensor | None]
"""Codes [M, K] and transposed codes [K, M]; None where not asked for."""


def cast_delayed(x: torch.Tensor, scale: torch.Tensor, fmt: Format, amax: torch.Tensor | None, *, plain: bool = True,
                 turned: bool = True) -> Cast:  # fmt: skip
    """Cast contiguous `x` [M, K] with a known `scale` (fp32, one element); raise `amax` (fp32, one element) if given."""
    codes, transposed = _empty(x, fmt, plain, turned)
    _launch(x, scale, codes, transposed, amax, scale, fmt, measure=amax is not None, current=False)
    return codes, transposed


def cast_current(
    x: torch.Tensor, fmt: Format, *, plain: bool = True, turned: bool = True
) -> tuple[Cast, torch.Tensor, torch.Tensor]:
    """Cast `x` by the scale of its own amax; returns the codes, scale_inv and amax (fp32 [1] each)."""
    codes, transposed = _empty(x, fmt, plain, turned)
    amax = torch.zeros(1, dtype=torch.float32, device=x.device)
    scale_inv = torch.empty(1, dtype=torch.float32, device=x.device)
    cast.raise_amax(x, amax)
    _launch(x, scale_inv, codes, transposed, amax, scale_inv, fmt, measure=False, current=True)
    return (codes, transposed), scale_inv, amax


def _empty(x: torch.Tensor, fmt: Format, plain: bool, turned: bool) -> Cast:
    rows, columns = x.shape
    dtype = torch_dtype(fmt)
    codes = torch.empty((rows, columns), dtype=dtype, device=x.device) if plain else None
    return codes, torch.empty((columns, rows), dtype=dtype, device=x.device) if turned else None


def _launch(x: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor | None, turned: torch.Tensor | None,
            amax: torch.Tensor | None, scale_inv: torch.Tensor, fmt: Format, *, measure: bool,
            current: bool) -> None:  # fmt: skip
    rows, columns = x.shape
    assert codes is not None or turned is not None, "a cast without codes"
    any_codes = turned if codes is None else codes
    slot = scale if amax is None else amax
    constants = (
        codec.MODES[fmt.name], fmt.max, codes is not None, turned is not None, measure, current,
        rows % TILE_ROWS == 0 and columns % TILE_COLUMNS == 0, TILE_ROWS, TILE_COLUMNS, hardware_casts(x),
    )  # fmt: skip
    numbers = (rows, columns)
    addresses = tuple(tensor.data_ptr() % 16 == 0 for tensor in (x, scale, slot, scale_inv))
    key = (x.dtype, constants, addresses, *(number % 16 == 0 or (number == 1 and "one") for number in numbers))
    pointers = (x, scale, any_codes, any_codes if turned is None else turned, slot, scale_inv)
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))
    with on_device(x):
        start(_operand_kernel, grid, (*pointers, *numbers, *constants), key, num_warps=WARPS)


def cast_groups(
    x: torch.Tensor, fmt: Format, *, plain: bool = True, turned: bool = True
) -> tuple[blocks.Coded | None, blocks.Coded | None]:
    """1x128 groups of `x` [M, K] along K, and along M transposed; scale_inv with the outer axis contiguous."""
    rows, columns = x.shape
    codes, transposed = _empty(x, fmt, plain, turned)
    found = None if codes is None else (codes, _scales(columns // 128, rows, x.device).t())
    found_turned = None if transposed is None else (transposed, _scales(rows // 128, columns, x.device).t())
    blocks.quantize_groups(x, fmt, found, found_turned)
    return found, found_turned


def cast_tiles(x: torch.Tensor, fmt: Format, *, turned: bool = True) -> tuple[blocks.Coded, blocks.Coded | None]:
    """128x128 tiles of `x` [N, K] and of its transpose, scale_inv [N / 128, K / 128] with padded rows."""
    codes, transposed = _empty(x, fmt, True, turned)
    rows, columns = x.shape[0] // 128, x.shape[1] // 128
    assert codes is not None
    plain = (codes, _scales(rows, columns, x.device))
    blocks.quantize_tiles(x, fmt, plain)
    if transposed is None:
        return plain, None
    cast.turn(codes.t(), transposed)
    found_turned = (transposed, _scales(columns, rows, x.device))
    found_turned[1].copy_(plain[1].t())
    return plain, found_turned


def _scales(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """fp32 [rows, columns] whose rows begin at multiples of 16 bytes, as cuBLASLt wants."""
    return torch.empty((rows, (columns + 3) // 4 * 4), dtype=torch.float32, device=device)[:, :columns]
