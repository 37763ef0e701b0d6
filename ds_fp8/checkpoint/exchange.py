"""What ranks tell each other before a load and around a save; alone, a rank hears itself."""

from __future__ import annotations

from typing import Any

from deepspeed import comm as dist


def from_all_ranks(own: Any) -> list[Any]:
    """What every rank brings, by rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def from_rank_0(own: Any) -> Any:
    """What rank 0 brings, on all ranks. Collective."""
    found = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]
