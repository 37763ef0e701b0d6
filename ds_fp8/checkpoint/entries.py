"""Our entry of an optimizer shard is checked completely before any of it is used.

`zero.states.check_quantized` looks at the head; here every partition is checked as its load would (names, formats,
sizes, dtypes, steps, scales), against the layout that the entry itself gives. And since the fp32 flats beside it were
decoded from it, the masters are decoded again and compared: where only one of the two was changed, neither can be
trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import CheckpointError
from ..optim import checkpointing, masters
from ..zero.states import KEY, check_quantized


def check_entry(entry: Any, where: str, *, rank: int, world_size: int) -> None:
    """Raise CheckpointError if `entry`, what stands under KEY in a shard, is damaged or another rank's."""
    check_quantized(entry, where)
    if entry is None:
        return
    layout, quantized = entry["layout"], entry["codes"]
    for key in ("rank", "world_size"):
        if not isinstance(layout.get(key, 0), int):
            raise CheckpointError(f"{where}: {KEY}/layout/{key} is {layout[key]!r}, a whole number is expected.")
    if layout.get("world_size") == world_size and layout.get("rank", rank) != rank:
        raise CheckpointError(
            f"{where}: holds the states of rank {layout['rank']}, and this is rank {rank}: files were renamed into each"
            " other.\n  Give each shard its own name back, or use another tag."
        )
    for number, (numel, one) in enumerate(zip(layout["numel"], quantized, strict=True)):
        checkpointing.check_saved(one, numel, f"{where}: {KEY}, partition {number}")


@torch.no_grad()
def check_masters(entry: dict[str, Any], flats: Sequence[torch.Tensor], where: str) -> None:
    """Raise CheckpointError if the fp32 masters beside a checked entry are not what it decodes to.

    flats  fp32 [<= numel] each, one for each partition; DeepSpeed leaves padding out
    """
    for number, (one, flat) in enumerate(zip(entry["codes"], flats, strict=False)):
        weight = one["weight"]
        decoded = masters.export_master(one["tensors"], one["formats"]["master"], weight).reshape(-1)
        shared = min(flat.numel(), decoded.numel())
        found = flat.detach().reshape(-1)[:shared].float()
        different = (decoded[:shared] != found) & ~(decoded[:shared].isnan() & found.isnan())
        if different.any():
            raise CheckpointError(
                f"{where}: {int(different.sum())} of {shared} fp32 masters of partition {number} are not those that "
                f"the exact states beside them ({KEY}) stand for: one of the two was changed after the save.\n"
                "  Use another tag; or `ds_fp8 convert DIR OUT --level plain` to go on from the fp32 values alone."
            )
