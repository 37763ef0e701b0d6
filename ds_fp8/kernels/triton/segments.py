"""Many weights in one launch: amaxes, and quantized values with one scale for each.

O3 casts every weight that an FP8 layer owns after each step. A launch costs the host some 30 microseconds whatever it
does, and there are hundreds of weights. A table on the device says which weight a program works on; it is made once for
a set of addresses, which stay from step to step, so that no step waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...formats import E4M3, Format
from . import codec
from .cast import raise_slot
from .launch import LAUNCH, hardware_casts, on_device

ELEMENTS = 4096


@triton.jit
def _segments_kernel(source_ptr, target_ptr, table_ptr, owner_ptr, scale_ptr, amax_ptr, FMT: tl.constexpr,
                     MEASURE: tl.constexpr, WRITE: tl.constexpr, ALIGNED: tl.constexpr, ELEMENTS: tl.constexpr,
                     HARDWARE: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    segment = tl.load(owner_ptr + program)
    row = table_ptr + segment * 4
    source, target, numel = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if ALIGNED:
        source, target, numel = tl.multiple_of(source, 16), tl.multiple_of(target, 16), tl.multiple_of(numel, 16)
    index = (program - tl.load(row + 3)) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = index < numel
    x = codec.load(source_ptr + (source + index), inside)
    if WRITE:
        quantized = codec.encode(x * tl.load(scale_ptr + segment), FMT, HARDWARE)
        tl.store(target_ptr + (target + index), quantized, mask=inside)
    if MEASURE:
        raise_slot(amax_ptr + segment, tl.max(codec.magnitude_bits(x), axis=0))


def amaxes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 [tensors]: the amax of each, inf for what is not finite; contiguous tensors of one dtype on one device."""
    found = torch.zeros(len(tensors), dtype=torch.float32, device=tensors[0].device)
    _launch(tensors, None, found, E4M3, found)
    return found


def quantize(
    tensors: Sequence[torch.Tensor], scales: torch.Tensor, fmt: Format, quantized: Sequence[torch.Tensor]
) -> None:
    """Fill `quantized` (uint8, as many elements) with sat(tensor * its scale); `scales` fp32 [tensors]."""
    _launch(tensors, quantized, scales, fmt, None)


def _launch(tensors: Sequence[torch.Tensor], quantized: Sequence[torch.Tensor] | None, scales: torch.Tensor,
            fmt: Format, found: torch.Tensor | None) -> None:  # fmt: skip
    first, first_target = tensors[0], tensors[0] if quantized is None else quantized[0]
    size, start = first.element_size(), first.data_ptr()
    rows = []
    for tensor, target in zip(tensors, tensors if quantized is None else quantized, strict=True):
        away = 0 if quantized is None else target.data_ptr() - first_target.data_ptr()
        rows.append(((tensor.data_ptr() - start) // size, away, tensor.numel()))
    aligned = start % 16 == 0 and first_target.data_ptr() % 16 == 0 and not any(one % 16 for row in rows for one in row)
    table, owners = _table(tuple(rows), first.device)
    if not owners.numel():
        return
    with on_device(first):
        _segments_kernel[(owners.numel(),)](
            first, first_target, table, owners, scales, scales if found is None else found,
            codec.MODES[fmt.name], found is not None, quantized is not None, aligned, ELEMENTS, hardware_casts(first),
            **LAUNCH,
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _table(rows: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [segments, 4]: offsets of source and target, elements, first program; int32 [programs]: their segment)."""
    programs = [-(-numel // ELEMENTS) for _, _, numel in rows]
    starts = [sum(programs[:number]) for number in range(len(rows))]
    entries = [(*row, start) for row, start in zip(rows, starts, strict=True)]
    table = torch.tensor(entries, dtype=torch.int64, device="cpu")
    counts = torch.tensor(programs, dtype=torch.int64, device="cpu")
    owners = torch.arange(len(rows), dtype=torch.int32, device="cpu").repeat_interleave(counts)
    return table.to(device), owners.to(device)
