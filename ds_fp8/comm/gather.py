"""All-gather of unequal shares, in place: how updated weights reach every rank at O3.

A flat partition holds quantized values (1 byte) where an FP8 layer owns the weight and 16-bit elements where none does,
so ranks have different amounts of each. `all_gather_into_tensor` wants equal shares and padding to the largest could
cost more than FP8 saves (an embedding fills one rank with 16-bit weights). So equal shares go by one all-gather, and
unequal ones as one broadcast per owner, all in flight together; either way a byte crosses the network once per
receiver.

gloo's own all-gather was three to eight times slower than its broadcasts and all_to_all on the same bytes (torch 2.13,
13 MB over a loopback; one microbenchmark on a busy machine, not repeated), so on the CPU those two do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from . import scratch as scratch_memory
from .counters import all_gather_bytes, counters
from .route import Route, group_ranks


def all_gather_shares(store: Tensor, bounds: Sequence[int], group: Any, *, kind: str = "weight") -> None:
    """Fill `store` with every rank's share: rank r owns `store[bounds[r] : bounds[r + 1]]` and has it filled already.

    store   flat, contiguous, any dtype that the backend carries (quantized values as uint8)
    kind    under which the bytes are counted
    """
    world_size, rank = dist.get_world_size(group=group), dist.get_rank(group=group)
    if world_size == 1:
        return
    sizes = [stop - start for start, stop in pairwise(bounds)]
    own = store[bounds[rank] : bounds[rank + 1]]
    counters.add(kind, all_gather_bytes(own.numel() * own.element_size(), world_size))
    if max(sizes) == 0:
        return
    if min(sizes) == max(sizes) and store.device.type != "cpu":
        dist.all_gather_into_tensor(store[bounds[0] : bounds[-1]], own.clone(), group=group)
        return
    sources = group_ranks(group)
    handles = [
        dist.broadcast(store[bounds[r] : bounds[r + 1]], sources[r], group=group, async_op=True)
        for r in range(world_size)
        if sizes[r]
    ]
    for handle in handles:
        if handle is not None:
            handle.wait()


def gather_messages(message: Tensor, route: Route) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Send `message` [n] uint8, of equal size on all ranks, to everyone: (handle, all messages by rank, scratch).

    The messages may be read once the handle's wait has returned; the own one is `message` itself where that saves a
    copy. The scratch holds them and what is being sent: keep it until the wait, give it back when they have been read.
    """
    size, others = message.numel(), route.world_size - 1
    if message.device.type != "cpu":
        gathered = torch.empty(route.world_size * size, dtype=torch.uint8, device=message.device)
        work = dist.all_gather_into_tensor(gathered, message, group=route.group, async_op=True)
        return work, list(gathered.split(size)), [gathered, message]
    scratch = [message]
    send = message
    if others > 1:
        send = scratch_memory.take(others * size, message.device)
        send.view(others, size).copy_(message)
        scratch.append(send)
    splits = [0 if rank == route.rank else size for rank in range(route.world_size)]
    gathered = scratch_memory.take(others * size, message.device)
    scratch.append(gathered)
    work = dist.all_to_all_single(gathered, send, splits, splits, group=route.group, async_op=True)
    rows = list(gathered.split(size))
    rows.insert(route.rank, message)
    return work, rows, scratch
