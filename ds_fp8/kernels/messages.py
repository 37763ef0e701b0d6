"""Messages of the wire, whatever the device: on a GPU one launch for all of a round, on the CPU one C++ pass for each.

The names and arguments are those of `numerics.messages`, the reference. A fast path may have

    encode_messages(tensor, layout, fmt, out)   sum_messages(quantized, scale_inv, fmt, own, layout, factor, out)
    decode_rows(rows, fmt, share, out)
"""

from __future__ import annotations

from typing import Any

import torch

from ..formats import Format
from ..numerics.messages import Layout, message_views, row_numels, sequence
from .dispatch import flat_decode, flat_encode, flat_sum, library_for


def _fast(name: str, tensor: torch.Tensor, *arguments: Any) -> bool:
    """Whether the fast path of this device has done it."""
    function = getattr(library_for(tensor.device), name, None)
    return function is not None and function(*arguments) is not NotImplemented


def encode_messages(tensor: torch.Tensor, layout: Layout, fmt: Format, out: torch.Tensor) -> None:
    """See numerics.messages.encode_messages: the sequences of `tensor` into messages end to end in `out`."""
    if tensor.is_contiguous() and _fast("encode_messages", tensor, tensor, layout, fmt, out):
        return
    for spans, numel, message in zip(layout.spans, layout.numels, out.split(layout.bytes), strict=True):
        if numel:
            flat_encode(sequence(tensor, spans), fmt, best_of_two=True, out=message_views(message, numel))


def sum_messages(
    quantized: torch.Tensor,
    scale_inv: torch.Tensor,
    fmt: Format,
    own: torch.Tensor,
    layout: Layout,
    *,
    factor: float,
    out: torch.Tensor,
) -> None:
    """See numerics.messages.sum_messages: factor * (own + what arrived) into `out`."""
    spans = layout.spans[0]
    given = (quantized, scale_inv, fmt, own, layout, factor, out)
    if len(spans) > 1 and own.is_contiguous() and out.is_contiguous() and _fast("sum_messages", own, *given):
        return
    flat_sum(quantized, scale_inv, fmt, factor=factor, out=out, own=sequence(own, spans))


def decode_rows(rows: torch.Tensor, fmt: Format, share: int, out: torch.Tensor) -> None:
    """See numerics.messages.decode_rows: what every rank has sent, into `out`."""
    if rows.is_contiguous() and out.is_contiguous() and _fast("decode_rows", out, rows, fmt, share, out):
        return
    for row, numel in enumerate(row_numels(out.numel(), share, rows.shape[0])):
        if numel:
            quantized, scale_inv = message_views(rows[row], numel)
            flat_decode(quantized, scale_inv, fmt, out=out[row * share : row * share + numel])
