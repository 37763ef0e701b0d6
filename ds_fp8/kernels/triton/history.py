"""Folding amaxes into histories and scales: the twin of `layers.amax_history` in one launch instead of thirty.

A region opens once per forward, and in a small model the host's time for it is what FP8 costs. A program takes a few columns
(tensors) with their whole history; the rolled history goes to a second buffer, because rows move while others are read.
The rules and their order are those of `AmaxHistory.fold` and `numerics.scaling`, to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import LAUNCH, on_device

COLUMNS, ROWS = 16, 64


@triton.jit
def _fold_kernel(amax_ptr, history_ptr, rolled_ptr, scale_ptr, columns, fmax, margin_factor, LENGTH: tl.constexpr,
                 RENEW: tl.constexpr, MOST_RECENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    amax = tl.load(amax_ptr + column, mask=inside, other=0.0)
    seen = amax > 0.0
    found = amax
    for first in range(0, LENGTH, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row[:, None] < LENGTH) & inside[None, :]
        held = tl.load(history_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
        # Slot 0 becomes the newest amax; what it held counts no more.
        older = tl.where(row[:, None] == 0, 0.0, held)
        if not MOST_RECENT:
            found = tl.maximum(found, tl.max(older, axis=0))
        # Rolled by -1 and slot 0 zeroed: slot i takes what slot i + 1 held, slot 1's content is dropped.
        target = tl.where(seen[None, :], row[:, None] - 1, row[:, None])
        kept = mask & ((row[:, None] > 1) | (seen[None, :] == 0))
        tl.store(rolled_ptr + target * columns + column[None, :], held, mask=kept)
    seen_inside = seen & inside
    if LENGTH > 1:
        tl.store(rolled_ptr + (LENGTH - 1) * columns + column, amax, mask=seen_inside)
    tl.store(rolled_ptr + column, tl.zeros_like(amax), mask=seen_inside)
    if RENEW:
        one = tl.full(found.shape, 1.0, tl.float32)
        bits = found.to(tl.int32, bitcast=True)
        ordinary = (bits > 0) & (bits < 0x7F800000)
        scale = tl.div_rn(tl.div_rn(one * fmax, tl.where(ordinary, found, 1.0)), one * margin_factor)
        scale_bits = tl.minimum(scale.to(tl.int32, bitcast=True), 0x7F7FFFFF)  # infinite: the largest finite fp32
        tl.store(scale_ptr + column, scale_bits.to(tl.float32, bitcast=True), mask=seen_inside & ordinary)


def fold(amax: torch.Tensor, history: torch.Tensor, rolled: torch.Tensor, scale: torch.Tensor, *, fmax: float, margin: int,
         renew: bool, most_recent: bool) -> None:  # fmt: skip
    """Fold `amax` [n] into `history` [length, n], leaving the result in `rolled`; renew `scale` [n] in place if asked."""
    length, columns = history.shape
    if columns:
        with on_device(history):
            _fold_kernel[(triton.cdiv(columns, COLUMNS),)](
                amax, history, rolled, scale, columns, fmax, 2.0**margin, length, renew, most_recent, ROWS, COLUMNS, **LAUNCH,
            )  # fmt: skip
