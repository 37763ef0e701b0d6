"""Sums over ranks with FP8 on the wire and fp32 in the sum.

`reduce_cut` is ZeRO's half: slice d of every rank goes to owner d, which adds. It is cast from where it lies in the
bucket, for all owners at once, and summed straight into its place: two kernels for a round on a GPU. One all_to_all of
bytes, (W - 1) / W bytes per parameter and rank, where DeepSpeed's ZeRO 1 and 2 all-reduce whole buckets in 16 bits:
four bytes. `all_reduce` (stage 0) adds one all-gather of the sum, cast again: twice the bytes, and each rank ends with
the same bits, since all decode the same quantized values.

Large tensors go in rounds of bounded size, and while one round is on the network the next is being cast and the
previous one summed. Waiting is left to the collective's handle, which on a GPU orders streams and never stops the
host, so all of this may run in DeepSpeed's reduction stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from .. import kernels
from ..formats import BLOCK_SIZE
from ..numerics.flat import blocks_of
from ..numerics.messages import message_bytes, message_views, sequence
from . import scratch
from .counters import all_gather_bytes, all_reduce_bytes, counters
from .cut import Cut, Round, adjacent, cut_at, join
from .gather import gather_messages
from .route import Route, flat_route
from .wire import Wire

Deliver = Callable[[int, Tensor], None]
"""deliver(start, part): elements [start, start + len(part)) of the own slice are summed."""


Gathering = tuple[Any, list[Tensor], list[Tensor], Tensor]
"""A gather of sums on its way: handle, one row per rank, buffers to give back, the tensor that the rows belong to."""


def reduce_slices(
    slices: Sequence[Tensor],
    group: Any,
    *,
    wire: Wire,
    average: float = 1.0,
    out: Tensor | None = None,
    deliver: Deliver | None = None,
) -> Tensor | None:
    """`reduce_cut` of one flat contiguous tensor per owner; a copy puts them together unless they lie so in memory."""
    cut = cut_at(tuple(s.numel() for s in slices))
    return reduce_cut(join(slices), cut, group, wire=wire, average=average, out=out, deliver=deliver)


def reduce_cut(
    bucket: Tensor,
    cut: Cut,
    group: Any,
    *,
    wire: Wire,
    average: float = 1.0,
    out: Tensor | None = None,
    deliver: Deliver | None = None,
) -> Tensor | None:
    """Sum over ranks, the slice of each owner at its owner; returns this rank's slice in fp32, times `average`.

    bucket   flat, contiguous; not changed
    cut      what of it is whose; sizes equal on all ranks
    group    a process group, or a `Route` that sends high precision inside a node and FP8 between nodes
    out      where the sum goes, rounded once to its dtype; may be the own slice in `bucket`
    deliver  instead of `out`: called as deliver(start, part) for each finished part of the own slice, in order, so that
             no fp32 tensor of the slice's size is ever needed; it may overwrite that part of the own slice
    """
    route = group if isinstance(group, Route) else flat_route(group)
    assert len(cut.numels) == route.world_size, f"{len(cut.numels)} slices for {route.world_size} ranks"
    if deliver is None and out is None:
        out = torch.empty(cut.numels[route.rank], dtype=torch.float32, device=bucket.device)
    if not route.is_flat:
        slices = [sequence(bucket, spans) for spans in cut.spans]
        _reduce_two_level(slices, route, wire=wire, average=average, out=out, deliver=deliver)
        return out
    in_flight: tuple[Exchange | None, Round] | None = None
    for part in cut.rounds(wire, route.rank, bucket.device):
        exchange = _start_exchange(bucket, part, route, wire)
        if in_flight is not None:
            _finish(bucket, *in_flight, wire, average, out, deliver)
        in_flight = (exchange, part)
    if in_flight is not None:
        _finish(bucket, *in_flight, wire, average, out, deliver)
    return out


def _finish(
    bucket: Tensor,
    exchange: Exchange | None,
    part: Round,
    wire: Wire,
    average: float,
    out: Tensor | None,
    deliver: Deliver | None,
) -> None:
    """One round has arrived: sum it, and put it where it belongs."""
    numel = part.own.numels[0]
    target = None if out is None else out[part.start : part.start + numel]
    total = _sum_received(exchange, bucket, part, wire, average, target)
    if deliver is not None and numel:
        deliver(part.start, total)


@dataclass
class Exchange:
    """One round on its way: the handle, what arrives, and what is sent and must live until then. Both are scratch."""

    handle: Any
    received: Tensor
    sent: Tensor

    def give_back(self) -> None:
        """After the wait, when what was received has been read."""
        scratch.give_back(self.received, self.sent)


def _start_exchange(bucket: Tensor, part: Round, route: Route, wire: Wire) -> Exchange | None:
    """Cast and send to each owner its part. None with one rank: nothing travels."""
    if route.world_size == 1:
        return None
    if wire.fmt is None:
        dtype, sizes, arriving = bucket.dtype, part.sent.numels, part.own.numels[0]
    else:
        dtype, sizes, arriving = torch.uint8, part.sent.bytes, part.own.bytes[0]
    send = scratch.take(sum(sizes) * dtype.itemsize, bucket.device).view(dtype)
    received = scratch.take((route.world_size - 1) * arriving * dtype.itemsize, bucket.device).view(dtype)
    if wire.fmt is not None:
        kernels.encode_messages(bucket, part.sent, wire.fmt, send)
    else:
        for message, spans in zip(send.split(sizes), part.sent.spans, strict=True):
            message.copy_(sequence(bucket, spans))
    splits = [arriving] * route.world_size
    splits[route.rank] = 0
    sending = [*sizes[: route.rank], 0, *sizes[route.rank :]]
    handle = dist.all_to_all_single(received, send, splits, sending, group=route.group, async_op=True)
    counters.add("gradient", sum(part.sent.numels) * (1 if wire.fmt else bucket.element_size()))
    if wire.fmt is not None:
        counters.add("scale", 4 * sum(blocks_of(numel) for numel in part.sent.numels))
    return Exchange(handle, received, send)


def _sum_received(
    exchange: Exchange | None, bucket: Tensor, part: Round, wire: Wire, average: float, out: Tensor | None
) -> Tensor:
    """Sum of the own contribution and what the others sent, in fp32 and rank order, times `average`.

    The own one does not travel, so it enters the sum without a cast.
    """
    quantized = _wait_for_quantized(exchange, part.own.numels[0], wire)
    if quantized is not None:
        assert exchange is not None and wire.fmt is not None
        if out is None:
            out = torch.empty(part.own.numels[0], dtype=torch.float32, device=bucket.device)
        kernels.sum_messages(*quantized, wire.fmt, bucket, part.own, factor=average, out=out)
        exchange.give_back()
        return out
    own = sequence(bucket, part.own.spans[0])
    exact = out is not None and (out.dtype == torch.float32 or (exchange is None and out.dtype == own.dtype))
    total = out if exact else torch.empty(own.numel(), dtype=torch.float32, device=own.device)
    assert total is not None
    if own.dtype == total.dtype:
        torch.mul(own, average, out=total)
    else:
        total.copy_(own).mul_(average)
    if exchange is not None and own.numel():
        for contribution in exchange.received.view(-1, own.numel()):
            total.add_(contribution, alpha=average)
    if exchange is not None:
        exchange.give_back()
    return total if out is None or total is out else out.copy_(total)


def _wait_for_quantized(exchange: Exchange | None, numel: int, wire: Wire) -> tuple[Tensor, Tensor] | None:
    """Wait; quantized [W - 1, n] and scale_inv of the others. None where none were sent: one rank, no cast, an empty
    slice.
    """
    if exchange is None:
        return None
    if exchange.handle is not None:
        exchange.handle.wait()
    if wire.fmt is None or numel == 0:
        return None
    return message_views(exchange.received.view(-1, message_bytes(numel)), numel)


def all_reduce(tensor: Tensor, group: Any, *, wire: Wire, average: float = 1.0) -> Tensor:
    """Sum `tensor` over the group times `average`, in place, the same bits on every rank (stage 0).

    Each rank owns a share of whole blocks, sums it in fp32, casts the sum once more and gathers it to all.
    """
    route = group if isinstance(group, Route) else flat_route(group)
    flat = tensor.view(-1)
    if flat.numel() == 0:
        return tensor
    if not route.is_flat:
        return _all_reduce_two_level(tensor, route, wire=wire, average=average)
    if route.world_size == 1:
        flat.mul_(average)
        return tensor
    if wire.fmt is None:
        dist.all_reduce(flat, group=route.group)
        counters.add("gradient", all_reduce_bytes(flat.numel(), flat.element_size(), route.world_size))
        flat.mul_(average)
        return tensor
    reducing: tuple[Tensor, Exchange | None, Round] | None = None
    gathering: Gathering | None = None
    for ((start, stop),) in wire.chunks([flat.numel()], flat.device):
        chunk = flat[start:stop]
        bounds = owner_bounds(chunk.numel(), route.world_size)
        part = cut_at(tuple(b - a for a, b in pairwise(bounds))).whole(route.rank)
        exchange = _start_exchange(chunk, part, route, wire)
        if reducing is not None:
            if gathering is not None:
                _decode_gathered(gathering, wire)
            gathering = _start_gather(*reducing, route, wire, average)
        reducing = (chunk, exchange, part)
    if gathering is not None:
        _decode_gathered(gathering, wire)
    assert reducing is not None, "a tensor with elements has a round"
    _decode_gathered(_start_gather(*reducing, route, wire, average), wire)
    return tensor


def owner_share(numel: int, world_size: int) -> int:
    """Elements of a share of whole blocks, as even as blocks allow."""
    return -(-blocks_of(numel) // world_size) * BLOCK_SIZE


def owner_bounds(numel: int, world_size: int) -> list[int]:
    """Where such shares begin and end; the last ones may be short or empty."""
    share = owner_share(numel, world_size)
    return [min(numel, d * share) for d in range(world_size + 1)]


def _start_gather(
    chunk: Tensor, exchange: Exchange | None, part: Round, route: Route, wire: Wire, average: float
) -> Gathering:
    """Finish the sum of the own share, cast it again and send it to everyone."""
    own = sequence(chunk, part.own.spans[0])
    received = _wait_for_quantized(exchange, own.numel(), wire)
    # Every rank sends as much as the largest share takes, so that messages are equal.
    size = message_bytes(part.numels[0])
    message = scratch.take(size, own.device)
    if received is not None:
        assert wire.fmt is not None
        target = message_views(message, own.numel())
        kernels.flat_sum_encode(*received, wire.fmt, factor=average, own=own, best_of_two=True, out=target)
    if exchange is not None:
        exchange.give_back()
    work, rows, buffers = gather_messages(message, route)
    quantized_bytes = all_gather_bytes(own.numel(), route.world_size)
    counters.add("gradient", quantized_bytes)
    counters.add("scale", all_gather_bytes(size, route.world_size) - quantized_bytes)
    return work, rows, buffers, chunk


def _decode_gathered(gathering: Gathering, wire: Wire) -> None:
    work, rows, buffers, chunk = gathering
    assert wire.fmt is not None
    if work is not None:
        work.wait()
    share, together = owner_share(chunk.numel(), len(rows)), adjacent(rows)
    if together is not None:
        kernels.decode_rows(together.view(len(rows), -1), wire.fmt, share, chunk)
    else:
        for row, part in zip(rows, chunk.split(share), strict=False):  # the last ranks may have nothing
            kernels.flat_decode(*message_views(row, part.numel()), wire.fmt, out=part)
    scratch.give_back(*buffers)


def _reduce_two_level(
    slices: Sequence[Tensor],
    route: Route,
    *,
    wire: Wire,
    average: float,
    out: Tensor | None,
    deliver: Deliver | None,
) -> None:
    """High precision inside the node, then the wire between ranks of equal place in their nodes."""
    inner, outer = route.levels
    places, nodes = range(inner.world_size), range(outer.world_size)
    by_place = [[slices[route.owner(node, place)] for node in nodes] for place in places]
    cut = cut_at(tuple(sum(one.numel() for one in of_nodes) for of_nodes in by_place))
    bucket = join([one for of_nodes in by_place for one in of_nodes])
    own = reduce_cut(bucket, cut, inner, wire=Wire(None, wire.chunk_numel))
    assert own is not None, "without `deliver` the sum comes back"
    sizes = [slices[route.owner(node, inner.rank)].numel() for node in nodes]
    reduce_slices(own.split(sizes), outer, wire=wire, average=average, out=out, deliver=deliver)


def _all_reduce_two_level(tensor: Tensor, route: Route, *, wire: Wire, average: float) -> Tensor:
    """Reduce inside the node to shares, all-reduce each share between nodes in FP8, gather inside the node."""
    flat = tensor.view(-1)
    inner, outer = route.levels
    places = inner.world_size
    for ((start, stop),) in wire.chunks([flat.numel()], flat.device):
        chunk = flat[start:stop]
        bounds = owner_bounds(chunk.numel(), places)
        parts = [chunk[a:b] for a, b in pairwise(bounds)]
        own = reduce_slices(parts, inner, wire=Wire(None, wire.chunk_numel))
        assert own is not None, "without `deliver` the sum comes back"
        all_reduce(own, outer, wire=wire, average=average)
        if places == 1:
            parts[0].copy_(own)
            continue
        share = torch.zeros(parts[0].numel(), dtype=chunk.dtype, device=chunk.device)
        share[: own.numel()].copy_(own)
        gathered = torch.empty(places * share.numel(), dtype=chunk.dtype, device=chunk.device)
        dist.all_gather_into_tensor(gathered, share, group=inner.group)
        counters.add("gradient", all_gather_bytes(share.numel() * share.element_size(), places))
        for row, part in zip(gathered.view(places, -1), parts, strict=True):
            part.copy_(row[: part.numel()])
    return tensor
