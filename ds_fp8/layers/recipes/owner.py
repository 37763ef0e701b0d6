"""What the owner of a part of a weight does at O3: measure it, and cast it as the layer would cast the whole.

Under ZeRO a rank owns a range of elements, which may begin and end anywhere in a weight. So amaxes are MAX-reduced
between the owners (`zero/weights.py`), and what is here looks at one range at a time: of a tensor with one scale, or of
128x128 tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from ...formats import BLOCK_SIZE, E4M3
from ...numerics.cast import dequantize

MANY = 256
"""Amaxes from which on their places are told to the device, instead of a launch for each."""


@dataclass(eq=False)
class Segment:
    """The part of a weight that this rank owns.

    weight     the whole: `shape` (N, K), or (experts, ., .)
    start      first element within the flattened weight
    source     flat 16-bit values
    quantized  flat uint8, same numel, where the quantized data go
    """

    weight: Any
    start: int
    source: Tensor
    quantized: Tensor


def tiles_of(shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of 128x128 tiles, the last ones short."""
    return -(-shape[0] // BLOCK_SIZE), -(-shape[1] // BLOCK_SIZE)


def measure_tensors(segments: Sequence[Segment], owners: Sequence[int], amaxes: Tensor) -> None:
    """MAX the amax of each segment into that of its weight: `amaxes` [weights], `owners` the numbers of the weights."""
    if not segments:
        return
    found = kernels.amax_many([segment.source for segment in segments])
    if list(owners) == list(range(amaxes.numel())):
        amaxes.copy_(found)
        return
    if len(owners) > MANY:
        amaxes.scatter_reduce_(0, torch.tensor(owners, dtype=torch.int64, device=amaxes.device), found, "amax")
        return
    per_weight = amaxes.split(1)
    for owner, amax in zip(owners, found.split(1), strict=True):
        torch.maximum(per_weight[owner], amax, out=per_weight[owner])


def quantize_tensors(segments: Sequence[Segment], scales: Sequence[Tensor]) -> None:
    """Fill the segments' data, one scale (0-d) each."""
    if segments:
        sources, quantized = [segment.source for segment in segments], [segment.quantized for segment in segments]
        kernels.quantize_many(sources, torch.stack(list(scales)), E4M3, quantized)


def row_runs(start: int, numel: int, width: int) -> list[tuple[int, int, int, int, int]]:
    """Cut elements [start, start + numel) of a row-major matrix into runs (offset, length, row, column, rows).

    A run is a part of one row (rows = 1), or whole rows; no run crosses a border between tiles of 128 rows.
    """
    runs, position, stop = [], start, start + numel
    while position < stop:
        row, column = divmod(position, width)
        if column or stop - position < width:
            length, rows = min(width - column, stop - position), 1
        else:
            rows = min((stop - position) // width, BLOCK_SIZE - row % BLOCK_SIZE)
            length = rows * width
        runs.append((position - start, length, row, column, rows))
        position += length
    return runs


def measure_tiles(segment: Segment, amaxes: Tensor) -> None:
    """MAX the amax of each 128x128 tile that the segment touches into `amaxes` [tile rows, tile columns]."""
    width = segment.weight.shape[1]
    for offset, length, row, column, rows in row_runs(segment.start, segment.source.numel(), width):
        values = segment.source[offset : offset + length].float().abs().view(rows, -1).amax(0)
        # NaN as inf, as every amax that crosses the network
        values = torch.where(values.isnan(), torch.full_like(values, torch.inf), values)
        amaxes[row // BLOCK_SIZE].scatter_reduce_(0, _columns_of(column, values.numel(), values.device), values, "amax")


def quantize_tiles(segment: Segment, scales: Tensor) -> None:
    """Cast with one scale per 128x128 tile, the same product and rounding as `quantize_128x128`."""
    width = segment.weight.shape[1]
    one = torch.ones((), dtype=torch.float32, device=scales.device)
    for offset, length, row, column, rows in row_runs(segment.start, segment.source.numel(), width):
        values = segment.source[offset : offset + length].float().view(rows, -1)
        scaled = values * scales[row // BLOCK_SIZE][_columns_of(column, values.shape[1], values.device)]
        quantized = kernels.quantize(scaled.view(-1), one, E4M3)
        segment.quantized[offset : offset + length].copy_(quantized.view(torch.uint8))


def decode_part(quantized: Tensor, start: int, shape: tuple[int, int], scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in `dtype` of the elements of a weight [N, K] that begin at `start`: as decoding the whole gives them.

    quantized  flat float8
    scale_inv  0-d fp32, or [ceil(N/128), ceil(K/128)]
    """
    if scale_inv.dim() != 2:
        return dequantize(quantized, scale_inv, dtype)
    values = torch.empty(quantized.numel(), dtype=dtype, device=quantized.device)
    for offset, length, row, column, rows in row_runs(start, quantized.numel(), shape[1]):
        part = quantized[offset : offset + length].float().view(rows, -1)
        scales = scale_inv[row // BLOCK_SIZE][_columns_of(column, part.shape[1], scale_inv.device)]
        values[offset : offset + length].view(rows, -1).copy_(part * scales)
    return values


def _columns_of(column: int, length: int, device: torch.device) -> Tensor:
    """Tile column of each of `length` elements that begin at `column`."""
    return torch.arange(column, column + length, device=device) // BLOCK_SIZE
