"""Our entry of an optimizer shard is checked completely before any of it is used.

`zero.states.check_quantized` looks at the head; here every partition is checked as its load would (names, formats,
sizes, dtypes, steps, scales), against the layout that the entry itself gives. And since the fp32 flats beside it were
decoded from it, all of them are decoded again and compared: where only one of the two was changed, neither can be
trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..algorithms import MOMENTS
from ..errors import CheckpointError
from ..optim import checkpointing, codecs, masters
from ..zero.states import KEY, check_quantized

CONVERTED = "converted"
"""Key of an entry that `ds_fp8 convert --level` has encoded anew: the fp32 values beside it are as they were."""

CLOSE = 1e-5
"""Relative distance at which a decoded moment is the one that was saved: a device may round a root or a quotient once
more than another; the coarsest formats are hundreds of times coarser.
"""

CURE = "  Use another tag; or `ds_fp8 convert DIR OUT --level plain` to go on from the fp32 values alone."


def check_entry(entry: Any, where: str, *, rank: int, world_size: int) -> None:
    """Raise CheckpointError if `entry`, what stands under KEY in a shard, is damaged or another rank's."""
    check_quantized(entry, where)
    if entry is None:
        return
    layout, quantized = entry["layout"], entry["codes"]
    check_owner(layout, where, rank=rank, world_size=world_size)
    for number, (numel, one) in enumerate(zip(layout["numel"], quantized, strict=True)):
        checkpointing.check_saved(one, numel, f"{where}: {KEY}, partition {number}")


def check_owner(saved: Any, where: str, *, rank: int, world_size: int) -> None:
    """Raise CheckpointError if a shard's `rank` and `world_size` are another rank's of a world of this size.

    saved  a mapping with both; None where the shard says nothing (DeepSpeed's own, or from before)
    """
    if saved is None:
        return
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where}: {KEY} is {type(saved).__name__}, a mapping is expected.")
    for key in ("rank", "world_size"):
        if not isinstance(saved.get(key, 0), int):
            raise CheckpointError(f"{where}: {KEY}, {key} is {saved[key]!r}, a whole number is expected.")
    if saved.get("world_size") == world_size and saved.get("rank", rank) != rank:
        raise CheckpointError(
            f"{where}: holds the states of rank {saved['rank']}, and this is rank {rank}: files were renamed into each"
            " other.\n  Give each shard its own name back, or use another tag."
        )


@torch.no_grad()
def check_masters(entry: dict[str, Any], flats: Sequence[torch.Tensor], where: str) -> None:
    """Raise CheckpointError if the fp32 masters beside a checked entry are not what it decodes to.

    flats  fp32 [<= numel] each, one for each partition; DeepSpeed leaves padding out
    """
    if entry.get(CONVERTED):
        return
    for number, (one, flat) in enumerate(zip(entry["codes"], flats, strict=False)):
        weight = one["weight"].reshape(-1)
        shared = min(flat.numel(), weight.numel())
        found = flat.detach().reshape(-1)[:shared]
        changed, alike = 0, True
        for first, last in codecs.chunks(0, weight.numel()):  # what is decoded is compared while a cache holds it
            decoded = masters.export_master(one["tensors"], one["formats"]["master"], weight, first, last)
            beside = found[first:last].float()
            same = decoded[: beside.numel()]
            if not torch.equal(same, beside):
                changed += int(((same != beside) & ~(same.isnan() & beside.isnan())).sum())
            alike = alike and _alike(weight[first:last], decoded, rtol=2**-6, atol=1e-5)
        if changed:
            raise CheckpointError(
                f"{where}: {changed} of {shared} fp32 masters of partition {number} are not those that the exact "
                f"states beside them ({KEY}) stand for: one of the two was changed after the save.\n{CURE}"
            )
        if not alike:
            raise CheckpointError(
                f"{where}: weights of partition {number} are not those of its masters ({KEY}): they were changed after "
                f"the save.\n{CURE}"
            )


@torch.no_grad()
def check_moments(entry: dict[str, Any], states: Sequence[Any], where: str) -> None:
    """Raise CheckpointError if the fp32 moments and steps beside a checked entry are not what it decodes to.

    states  one for each partition, {step, exp_avg, exp_avg_sq}; empty or None before the first step
    """
    if entry.get(CONVERTED):
        return
    for number, (one, state) in enumerate(zip(entry["codes"], states, strict=False)):
        if not one["step"] and not state:
            continue
        problem = _changed(one, state or {})
        if problem is not None:
            raise CheckpointError(
                f"{where}: {problem} of partition {number} is not what the exact states beside it ({KEY}) stand for: "
                f"one of the two was changed after the save.\n{CURE}"
            )


def _changed(one: dict[str, Any], state: dict[str, Any]) -> str | None:
    """What differs between exact states and the fp32 ones beside them; None: nothing."""
    if "step" in state and int(state["step"]) != one["step"]:
        return f"step {int(state['step'])}, not {one['step']},"
    for moment in MOMENTS:
        if moment not in one["formats"]:
            continue
        if moment not in state:
            return f"the lack of {moment}"
        found = state[moment].detach().reshape(-1)
        for first, last in codecs.chunks(0, min(found.numel(), one["weight"].numel())):
            decoded = codecs.export_moment(one["tensors"], moment, one["formats"], first, last)
            if not _alike(found[first:last], decoded, rtol=CLOSE, atol=1e-37):
                return moment
    return None


def _alike(found: torch.Tensor, decoded: torch.Tensor, *, rtol: float, atol: float) -> bool:
    """Mostly the same numbers, which is seen in a fraction of the time that `allclose` takes.

    found    [n] of any floating dtype
    decoded  [n] fp32
    """
    if torch.equal(found, decoded.to(found.dtype)):
        return True
    return torch.allclose(found.float(), decoded, rtol=rtol, atol=atol, equal_nan=True)
