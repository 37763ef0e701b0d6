"""Messages of the wire on a GPU: a whole round cast by one launch, summed by one, decoded by one.

The counterparts of `numerics.messages`. A program takes ROWS blocks of one message, as in `flat.py`, and finds its
elements by a table on the device: sequences are numbered through, each from a multiple of a program's elements on, so
one number tells the message and the place in it. The table is made once for a layout; a bucket of ZeRO 3 has the same
one in every step. Arithmetic is that of `flat.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...formats import BLOCK_SIZE, Format
from ...numerics.messages import Layout, Span, scale_offset
from . import codec, flat
from .launch import LAUNCH, hardware_casts, on_device

ROWS = 16
"""Blocks per program, as in `flat.py`."""

MOST = 4096
"""Spans, or messages, that a program can search."""

_BEYOND = 1 << 62


@triton.jit
def _found(table_ptr, place, COUNT: tl.constexpr):
    """The last of COUNT ascending numbers that is not above `place`."""
    return tl.sum((tl.load(table_ptr + tl.arange(0, COUNT)) <= place).to(tl.int32), axis=0) - 1


@triton.jit
def _sequence(source_ptr, spans_ptr, place, first, stop, SPANS: tl.constexpr, ALIGNED: tl.constexpr,
              ROWS: tl.constexpr):  # fmt: skip
    """fp32 values at `place` [ROWS, 128], which begins at `first`; zero from `stop` on. One span mostly has them."""
    span = _found(spans_ptr, first, SPANS)
    x = tl.zeros([ROWS, 128], tl.float32)
    reached = first
    while reached < stop:
        begin, end = tl.load(spans_ptr + span), tl.load(spans_ptr + SPANS + span)
        source = tl.load(spans_ptr + 2 * SPANS + span)
        if ALIGNED:
            begin, end, source = tl.multiple_of(begin, 16), tl.multiple_of(end, 16), tl.multiple_of(source, 16)
        inside = (place >= begin) & (place < end)
        x = tl.where(inside, codec.load(source_ptr + (place + source), inside), x)
        reached = end
        span += 1
    return x


@triton.jit
def _encode_kernel(source_ptr, spans_ptr, messages_ptr, quantized_ptr, scale_inv_ptr, FMT: tl.constexpr,
                   FMAX: tl.constexpr, SPANS: tl.constexpr, MESSAGES: tl.constexpr, ALIGNED: tl.constexpr,
                   ROWS: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    first = tl.program_id(0).to(tl.int64) * (ROWS * 128)
    message = _found(messages_ptr, first, MESSAGES)
    end = tl.load(messages_ptr + MESSAGES + message)
    values = tl.multiple_of(tl.load(messages_ptr + 2 * MESSAGES + message), 4)
    scales = tl.load(messages_ptr + 3 * MESSAGES + message)
    if ALIGNED:
        end = tl.multiple_of(end, 16)
    stop = tl.minimum(end, first + ROWS * 128)
    x = _sequence(source_ptr, spans_ptr, place, first, stop, SPANS, ALIGNED, ROWS)
    quantized, scale_inv = flat.encode_best_of_two(x, FMT, FMAX, ROWS, HARDWARE)
    tl.store(quantized_ptr + (place + values), quantized, mask=place < end)
    tl.store(scale_inv_ptr + (row + scales), scale_inv, mask=row * 128 < end)


@triton.jit
def _sum_kernel(own_ptr, spans_ptr, quantized_ptr, scale_inv_ptr, out_ptr, factor, n, quantized_stride, scale_stride,
                WORLD: tl.constexpr, FMT: tl.constexpr, SPANS: tl.constexpr, ALIGNED: tl.constexpr,
                ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    first = tl.program_id(0).to(tl.int64) * (ROWS * 128)
    stop = tl.minimum(first + ROWS * 128, n)
    total = _sequence(own_ptr, spans_ptr, place, first, stop, SPANS, ALIGNED, ROWS)
    inside = place < n
    element, block = place, row
    # In rank order, so that every owner and every device gets the same sum.
    for _ in range(WORLD):
        quantized = tl.load(quantized_ptr + element, mask=inside, other=0)
        scale_inv = tl.load(scale_inv_ptr + block, mask=row * 128 < n, other=0.0)
        total = total + codec.decode(quantized, FMT) * scale_inv[:, None]
        element += quantized_stride
        block += scale_stride
    codec.store(out_ptr + place, total * factor, inside)


@triton.jit
def _decode_kernel(quantized_ptr, scale_inv_ptr, out_ptr, n, share, row_bytes, FMT: tl.constexpr, ROWS: tl.constexpr):
    rank = tl.program_id(1).to(tl.int64)
    numel = tl.minimum(n - rank * share, share)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = index < numel
    scales = rank * (row_bytes // 4) + (numel + 3) // 4
    scale_inv = tl.load(scale_inv_ptr + scales + row, mask=row * 128 < numel, other=1.0)
    quantized = tl.load(quantized_ptr + rank * row_bytes + index, mask=inside, other=0)
    codec.store(out_ptr + rank * share + index, codec.decode(quantized, FMT) * scale_inv[:, None], inside)


def encode(tensor: torch.Tensor, layout: Layout, fmt: Format, out: torch.Tensor) -> None:
    """Fill the messages that lie end to end in `out` (uint8, at a multiple of 4) from the sequences of `tensor`."""
    if not any(layout.numels):
        return
    spans, messages, programs, aligned = _table(layout, tensor.device)
    with on_device(tensor):
        _encode_kernel[(programs,)](
            tensor, spans, messages, out, out.view(torch.float32), codec.MODES[fmt.name], fmt.max, spans.shape[1],
            messages.shape[1], aligned, ROWS, hardware_casts(tensor), **LAUNCH,
        )  # fmt: skip


def sum_own(quantized: torch.Tensor, scale_inv: torch.Tensor, fmt: Format, own: torch.Tensor, layout: Layout,
            factor: float, out: torch.Tensor) -> None:  # fmt: skip
    """Fill `out` [n] with factor * (the one sequence of `own` + sum over ranks of quantized * scale_inv)."""
    world, n = quantized.shape
    if n == 0:
        return
    spans, _, programs, aligned = _table(layout, own.device)
    with on_device(own):
        _sum_kernel[(programs,)](
            own, spans, quantized, scale_inv, out, factor, n, quantized.stride(0), scale_inv.stride(0), world,
            codec.MODES[fmt.name], spans.shape[1], aligned, ROWS, **LAUNCH,
        )  # fmt: skip


def decode(rows: torch.Tensor, fmt: Format, share: int, out: torch.Tensor) -> None:
    """Fill `out` [n] from a message of each rank, rows [W, bytes of a share] uint8; the last ones may be short."""
    if out.numel() == 0:
        return
    with on_device(out):
        _decode_kernel[(triton.cdiv(share, ROWS * BLOCK_SIZE), rows.shape[0])](
            rows, rows.view(torch.float32), out, out.numel(), share, rows.shape[1], codec.MODES[fmt.name], ROWS,
            **LAUNCH,
        )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _table(layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
    """(int64 [3, spans]: begin, end, how far the source is from there; int64 [4, messages]: begin, end, how far the
    quantized values are, and the scales by blocks; programs; whether all of it goes by 16 elements).
    """
    step = ROWS * BLOCK_SIZE
    spans: list[Sequence[int]] = []
    messages: list[Sequence[int]] = []
    place = byte = 0
    for of_one, numel, size in zip(layout.spans, layout.numels, layout.bytes, strict=True):
        if numel:
            scales = (byte + scale_offset(numel)) // 4 - place // BLOCK_SIZE
            messages.append((place, place + numel, byte - place, scales))
        spans.extend(_placed(of_one, place))
        place += -(-numel // step) * step
        byte += size
    aligned = not any(number % 16 for span in spans for number in span)
    return _padded(spans, device), _padded(messages, device), place // step, aligned


def _placed(spans: Sequence[Span], place: int) -> list[tuple[int, int, int]]:
    found = []
    for start, stop in spans:
        if start < stop:
            found.append((place, place + stop - start, start - place))
        place += stop - start
    return found


def _padded(rows: list[Sequence[int]], device: torch.device) -> torch.Tensor:
    """[columns, rows], the number of rows raised to a power of 4: few compilations."""
    count = 4
    while count < len(rows):
        count *= 4
    beyond = [(_BEYOND,) * len(rows[0])] * (count - len(rows))
    return torch.tensor([*rows, *beyond], dtype=torch.int64, device="cpu").t().contiguous().to(device)
