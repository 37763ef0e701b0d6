"""Sums over ranks with FP8 on the wire and fp32 in the sum.

`reduce_slices` is ZeRO's half: slice d of every rank goes to owner d, which adds. One all_to_all of bytes,
(W - 1) / W bytes per parameter and rank, where DeepSpeed's ZeRO 1 and 2 all-reduce whole buckets in 16 bits: four
bytes. `all_reduce` (stage 0) adds one all-gather of the sum, cast again: twice the bytes, and each rank ends with the
same bits, since all decode the same quantized values.

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
from . import scratch
from .counters import all_gather_bytes, all_reduce_bytes, counters
from .gather import gather_messages
from .route import Route, flat_route
from .wire import Wire, message_bytes, message_views, write_message

Deliver = Callable[[int, Tensor], None]
"""deliver(start, part): elements [start, start + len(part)) of the own slice are summed."""


Gathering = tuple[Any, list[Tensor], list[Tensor], list[Tensor]]
"""A gather of sums on its way: handle, one row per rank, buffers to give back, the parts that the rows belong to."""


def reduce_slices(
    slices: Sequence[Tensor],
    group: Any,
    *,
    wire: Wire,
    average: float = 1.0,
    out: Tensor | None = None,
    deliver: Deliver | None = None,
) -> Tensor | None:
    """Sum over ranks, slice d at its owner d; returns this rank's slice in fp32, times `average`.

    slices   one flat contiguous tensor per owner, sizes equal on all ranks; not changed
    group    a process group, or a `Route` that sends high precision inside a node and FP8 between nodes
    out      where the sum goes, fp32
    deliver  instead of `out`: called as deliver(start, part) for each finished part of the own slice, in order, so that
             no fp32 tensor of the slice's size is ever needed; it may overwrite that part of the own slice
    """
    route = group if isinstance(group, Route) else flat_route(group)
    own = slices[_own_slice(route)]
    if deliver is None and out is None:
        out = torch.empty(own.numel(), dtype=torch.float32, device=own.device)
    if not route.is_flat:
        _reduce_two_level(slices, route, wire=wire, average=average, out=out, deliver=deliver)
        return out
    assert len(slices) == route.world_size, f"{len(slices)} slices for {route.world_size} ranks"
    in_flight: tuple[Exchange | None, Tensor, int] | None = None
    for cut in wire.chunks([s.numel() for s in slices], own.device):
        parts = [s[start:stop] for s, (start, stop) in zip(slices, cut, strict=True)]
        exchange = _start_exchange(parts, route, wire)
        if in_flight is not None:
            _finish(*in_flight, wire, average, out, deliver)
        in_flight = (exchange, parts[route.rank], cut[route.rank][0])
    if in_flight is not None:
        _finish(*in_flight, wire, average, out, deliver)
    return out


def _own_slice(route: Route) -> int:
    """Which of the slices this rank owns."""
    if route.is_flat:
        return route.rank
    inner, outer = route.levels
    return route.owner(outer.rank, inner.rank)


def _finish(
    exchange: Exchange | None,
    own: Tensor,
    start: int,
    wire: Wire,
    average: float,
    out: Tensor | None,
    deliver: Deliver | None,
) -> None:
    """One round has arrived: sum it, and put it where it belongs."""
    numel = own.numel()
    total = _sum_received(exchange, own, wire, average, None if out is None else out[start : start + numel])
    if deliver is not None and numel:
        deliver(start, total)


@dataclass
class Exchange:
    """One round on its way: the handle, what arrives, and what is sent and must live until then. Both are scratch."""

    handle: Any
    received: Tensor
    sent: Tensor

    def give_back(self) -> None:
        """After the wait, when what was received has been read."""
        scratch.give_back(self.received, self.sent)


def _start_exchange(parts: list[Tensor], route: Route, wire: Wire) -> Exchange | None:
    """Cast and send each part to its owner. None with one rank: nothing travels."""
    world_size, rank, device = route.world_size, route.rank, parts[0].device
    if world_size == 1:
        return None
    numels = [part.numel() for part in parts]
    others = [d for d in range(world_size) if d != rank]
    if wire.fmt is None:
        dtype, sizes = parts[0].dtype, list(numels)
    else:
        dtype, sizes = torch.uint8, [message_bytes(n) for n in numels]
    sending = [0 if d == rank else sizes[d] for d in range(world_size)]
    arriving = [0 if d == rank else sizes[rank] for d in range(world_size)]
    send = scratch.take(sum(sending) * dtype.itemsize, device).view(dtype)
    received = scratch.take(sum(arriving) * dtype.itemsize, device).view(dtype)
    for d, message in zip(range(world_size), send.split(sending), strict=True):
        if d == rank:
            continue
        if wire.fmt is None:
            message.copy_(parts[d])
        else:
            write_message(parts[d], wire.fmt, message)
    handle = dist.all_to_all_single(received, send, arriving, sending, group=route.group, async_op=True)
    sent_numel = sum(numels[d] for d in others)
    element_bytes = 1 if wire.fmt else parts[0].element_size()
    counters.add("gradient", sent_numel * element_bytes)
    if wire.fmt is not None:
        counters.add("scale", 4 * sum(blocks_of(numels[d]) for d in others))
    return Exchange(handle, received, send)


def _sum_received(exchange: Exchange | None, own: Tensor, wire: Wire, average: float, out: Tensor | None) -> Tensor:
    """fp32 sum of the own contribution and what the others sent, in rank order, times `average`.

    The own one does not travel, so it enters the sum without a cast.
    """
    quantized = _wait_for_quantized(exchange, own, wire)
    if quantized is not None:
        assert exchange is not None and wire.fmt is not None
        total = kernels.flat_sum(*quantized, wire.fmt, factor=average, out=out, own=own)
        exchange.give_back()
        return total
    if out is None:
        out = torch.empty(own.numel(), dtype=torch.float32, device=own.device)
    if own.dtype == out.dtype:
        torch.mul(own, average, out=out)
    else:
        out.copy_(own).mul_(average)
    if exchange is not None and own.numel():
        for contribution in exchange.received.view(-1, own.numel()):
            out.add_(contribution, alpha=average)
    if exchange is not None:
        exchange.give_back()
    return out


def _wait_for_quantized(exchange: Exchange | None, own: Tensor, wire: Wire) -> tuple[Tensor, Tensor] | None:
    """Wait; quantized [W - 1, n] and scale_inv of the others. None where none were sent: one rank, no cast, an empty
    slice.
    """
    if exchange is None:
        return None
    if exchange.handle is not None:
        exchange.handle.wait()
    numel = own.numel()
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
    reducing: tuple[Exchange | None, list[Tensor]] | None = None
    gathering: Gathering | None = None
    for ((start, stop),) in wire.chunks([flat.numel()], flat.device):
        chunk = flat[start:stop]
        bounds = owner_bounds(chunk.numel(), route.world_size)
        parts = [chunk[a:b] for a, b in pairwise(bounds)]
        exchange = _start_exchange(parts, route, wire)
        if reducing is not None:
            if gathering is not None:
                _decode_gathered(gathering, wire)
            gathering = _start_gather(*reducing, route, wire, average)
        reducing = (exchange, parts)
    if gathering is not None:
        _decode_gathered(gathering, wire)
    assert reducing is not None, "a tensor with elements has a round"
    _decode_gathered(_start_gather(*reducing, route, wire, average), wire)
    return tensor


def owner_bounds(numel: int, world_size: int) -> list[int]:
    """Shares of whole blocks, as even as blocks allow; the last ones may be short or empty."""
    share = -(-blocks_of(numel) // world_size) * BLOCK_SIZE
    return [min(numel, d * share) for d in range(world_size + 1)]


def _start_gather(
    exchange: Exchange | None, parts: list[Tensor], route: Route, wire: Wire, average: float
) -> Gathering:
    """Finish the sum of the own share, cast it again and send it to everyone."""
    own = parts[route.rank]
    received = _wait_for_quantized(exchange, own, wire)
    # Every rank sends as much as the largest share takes, so that messages are equal.
    size = message_bytes(parts[0].numel())
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
    return work, rows, buffers, parts


def _decode_gathered(gathering: Gathering, wire: Wire) -> None:
    work, rows, buffers, parts = gathering
    assert wire.fmt is not None
    if work is not None:
        work.wait()
    for row, part in zip(rows, parts, strict=True):
        if part.numel():
            quantized, scale_inv = message_views(row, part.numel())
            kernels.flat_decode(quantized, scale_inv, wire.fmt, out=part)
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
    inside = []
    for place in range(inner.world_size):
        of_nodes = [slices[route.owner(node, place)] for node in range(outer.world_size)]
        inside.append(torch.cat(of_nodes) if len(of_nodes) > 1 else of_nodes[0])
    own = reduce_slices(inside, inner, wire=Wire(None, wire.chunk_numel))
    assert own is not None, "without `deliver` the sum comes back"
    sizes = [slices[route.owner(node, inner.rank)].numel() for node in range(outer.world_size)]
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
