"""All-gather of unequal shares, in place: how updated weights reach every rank at O3.

A flat partition holds codes (1 byte) where an FP8 layer owns the weight and 16-bit elements where none does, so ranks
have different amounts of each. `all_gather_into_tensor` wants equal shares and padding to the largest could cost more
than FP8 saves (an embedding fills one rank with 16-bit weights). So equal shares go by one all-gather, and unequal
ones as one broadcast per owner, all in flight together; either way a byte crosses the network once per receiver.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from deepspeed import comm as dist
from torch import Tensor

from .counters import all_gather_bytes, counters
from .route import group_ranks


def all_gather_shares(store: Tensor, bounds: Sequence[int], group: Any, *, kind: str = "weight") -> None:
    """Fill `store` with every rank's share: rank r owns `store[bounds[r] : bounds[r + 1]]` and has it filled already.

    store   flat, contiguous, any dtype that the backend carries (codes as uint8)
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
    if min(sizes) == max(sizes):
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
