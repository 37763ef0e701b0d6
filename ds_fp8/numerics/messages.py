"""Messages of quantized values: what travels when a gradient goes FP8, and where in memory it comes from.

    a message   | quantized values, 1 byte each | 0 to 3 bytes of padding | fp32 scale_inv per 128 elements |

The slice that goes to one owner need not lie in one piece: in ZeRO 3 it is a chunk of every parameter's gradient. A
`Layout` says which spans of a flat tensor make up each message; blocks of 128 run through the whole sequence of a
message, across spans. So a bucket is cast where it lies, without a copy that arranges it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..formats import Format
from . import flat
from .flat import blocks_of

Span = tuple[int, int]
"""(start, stop) in elements of a flat tensor."""


def scale_offset(numel: int) -> int:
    """Where the scales begin in a message of `numel` quantized values: the next multiple of 4, so that fp32 views are
    legal.
    """
    return -(-numel // 4) * 4


def message_bytes(numel: int) -> int:
    return scale_offset(numel) + 4 * blocks_of(numel)


def message_views(message: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantized values [..., numel] uint8 and scale_inv [..., blocks] fp32 inside `message` [...,
    message_bytes(numel)].
    """
    quantized = message[..., :numel]
    scale_inv = message[..., scale_offset(numel) : message_bytes(numel)].view(torch.float32)
    return quantized, scale_inv


@dataclass(frozen=True, eq=False)
class Layout:
    """Which spans of a flat tensor make up each message, in the order of its sequence. Compared by identity: a device
    keeps its table of one.
    """

    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each message."""
        return tuple(sum(stop - start for start, stop in of_one) for of_one in self.spans)

    @cached_property
    def bytes(self) -> tuple[int, ...]:
        """Bytes of each message; the next one begins where they end."""
        return tuple(message_bytes(numel) for numel in self.numels)


def merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same sequence in as few spans as it takes, none of them empty."""
    found: list[Span] = []
    for start, stop in spans:
        if start == stop:
            continue
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def between(spans: Sequence[Span], start: int, stop: int) -> tuple[Span, ...]:
    """What lies at [start, stop) of the sequence."""
    found, position = [], 0
    for first, last in spans:
        begin, end = max(start - position, 0), min(stop - position, last - first)
        if begin < end:
            found.append((first + begin, first + end))
        position += last - first
    return tuple(found)


def sequence(tensor: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    """The spans of `tensor` end to end; a view where they are one."""
    if len(spans) == 1:
        return tensor[spans[0][0] : spans[0][1]]
    return torch.cat([tensor[start:stop] for start, stop in spans]) if spans else tensor[:0]


def encode_messages(tensor: torch.Tensor, layout: Layout, fmt: Format, out: torch.Tensor) -> None:
    """Cast the sequences of `tensor` [n], fp32, bf16 or fp16, into messages that lie end to end in `out` (uint8), each
    block under the better of two scales. Padding is not written.
    """
    for spans, numel, message in zip(layout.spans, layout.numels, out.split(layout.bytes), strict=True):
        if numel:
            flat.encode(sequence(tensor, spans), fmt, best_of_two=True, out=message_views(message, numel))


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
    """`flat.sum_contributions` into `out` [n], where the own contribution is the only sequence of `layout` in `own`.

    `out` may be that very part of `own`, where it is one span.
    """
    flat.sum_contributions(quantized, scale_inv, fmt, factor=factor, out=out, own=sequence(own, layout.spans[0]))


def row_numels(numel: int, share: int, rows: int) -> list[int]:
    """Elements of each of `rows` equal shares of `numel`; the last ones may be short or empty."""
    return [max(0, min(share, numel - row * share)) for row in range(rows)]


def decode_rows(rows: torch.Tensor, fmt: Format, share: int, out: torch.Tensor) -> None:
    """Decode a gathered message of every rank, `rows` [W, message_bytes(share)] uint8, into `out` [n]: rank r's values
    begin at r * share; the last ranks may have less, or none. `share` is a multiple of 128.
    """
    for row, numel in enumerate(row_numels(out.numel(), share, rows.shape[0])):
        if numel:
            flat.decode(*message_views(rows[row], numel), fmt, out=out[row * share : row * share + numel])
