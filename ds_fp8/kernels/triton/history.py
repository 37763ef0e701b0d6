"""All scales of a model in one launch: amaxes taken into the histories, scales renewed, and written out once more.

In PyTorch these are forty launches, whose host time a small model would notice: once per optimizer step under an
engine, once per forward without one. A program takes a few columns (tensors) with their whole history; the rolled
history goes to a second buffer, because rows move while others are read. The rules and their order are those of
`layers.amax_history` and `numerics.scaling`, to the bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch
from .operands import FROZEN, SHOWN

COLUMNS, ROWS = 4, 256


class Half(NamedTuple):
    """The columns of one format: input and weight, or grad_output.

    history, rolled  [length, columns] fp32: as it is, and where the updated one goes (all of it is written)
    fmax             largest value of the format
    renew            whether this update renews the scales
    """

    history: torch.Tensor
    rolled: torch.Tensor
    fmax: float
    renew: bool


@triton.jit(do_not_specialize=["forward_columns", "backward_columns", "forward_renews", "backward_renews"])
def _update_kernel(pending_ptr, scale_ptr, frozen_ptr, forward_ptr, forward_rolled_ptr, backward_ptr,
                   backward_rolled_ptr, forward_columns, backward_columns, forward_renews, backward_renews,
                   FORWARD_MAX: tl.constexpr, BACKWARD_MAX: tl.constexpr, MARGIN_FACTOR: tl.constexpr,
                   LENGTH: tl.constexpr, MOST_RECENT: tl.constexpr, KEEP: tl.constexpr, FROZEN: tl.constexpr,
                   SHOWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    # Second axis of the grid: 0 for the columns of forward, 1 for those of backward, which come after them.
    is_backward = tl.program_id(1) == 1
    columns = tl.where(is_backward, backward_columns, forward_columns)
    first_column = tl.where(is_backward, forward_columns, 0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    place = first_column + column
    scale = tl.load(scale_ptr + place, mask=inside, other=1.0)
    history_ptr, rolled_ptr = forward_ptr, forward_rolled_ptr
    if is_backward:
        history_ptr, rolled_ptr = backward_ptr, backward_rolled_ptr
    amax = tl.load(pending_ptr + place, mask=inside, other=0.0)
    amax_bits = amax.to(tl.int32, bitcast=True)
    seen = amax > 0.0
    if not KEEP:
        seen = seen & (amax_bits < 0x7F800000)
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
    tl.store(pending_ptr + place, tl.zeros_like(amax), mask=inside)
    one = tl.full(found.shape, 1.0, tl.float32)
    bits = found.to(tl.int32, bitcast=True)
    positive_finite = (bits > 0) & (bits < 0x7F800000)
    fmax = tl.where(is_backward, BACKWARD_MAX, FORWARD_MAX)
    renewed = tl.div_rn(tl.div_rn(one * fmax, tl.where(positive_finite, found, 1.0)), one * MARGIN_FACTOR)
    renewed_bits = tl.minimum(renewed.to(tl.int32, bitcast=True), 0x7F7FFFFF)  # infinite: the largest finite fp32
    renews = tl.where(is_backward, backward_renews, forward_renews) != 0
    scale = tl.where(seen & positive_finite & renews, renewed_bits.to(tl.float32, bitcast=True), scale)
    tl.store(scale_ptr + place, scale, mask=inside)
    scale_inv = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    tl.store(frozen_ptr + place * FROZEN, scale_inv, mask=inside)
    tl.store(frozen_ptr + place * FROZEN + SHOWN, scale_inv, mask=inside)
    tl.store(frozen_ptr + place * FROZEN + 1, scale, mask=inside)


def update_scales(pending: torch.Tensor, scale: torch.Tensor, frozen: torch.Tensor, forward: Half, backward: Half,
                  *, margin: int, most_recent: bool, keeps_non_finite: bool) -> None:  # fmt: skip
    """Take the amaxes into histories and scales.

    pending  [columns] fp32: the amaxes, forward's columns first; zeroed
    scale    [columns] fp32: renewed in place
    frozen   [columns, FROZEN] fp32: gets scale_inv, twice, and scale
    keeps_non_finite  an infinite amax enters the history (Transformer Engine); otherwise its column is left alone
    """
    forward_columns, backward_columns = forward.history.shape[1], backward.history.shape[1]
    columns = max(forward_columns, backward_columns)
    if columns:
        length = forward.history.shape[0]
        launch = _launch(forward.fmax, backward.fmax, 2.0**margin, length, most_recent, keeps_non_finite)
        numbers = (forward_columns, backward_columns, int(forward.renew), int(backward.renew))
        launch((-(-columns // COLUMNS), 2), (pending, scale, frozen, *forward[:2], *backward[:2]), *numbers)


@functools.cache
def _launch(forward_max: float, backward_max: float, margin_factor: float, length: int, most_recent: bool,
            keep: bool) -> Launch:  # fmt: skip
    constants = (forward_max, backward_max, margin_factor, length, most_recent, keep, FROZEN, SHOWN, ROWS, COLUMNS)
    return Launch(_update_kernel, constants)
