"""Scales and histories in DeepSpeed's checkpoints: kept beside the model, never inside it.

The module's state_dict stays the unmodified model's, so a checkpoint of ours loads into a run without the plugin with
`strict=True`, and the other way round. The FP8 state travels in the client state under the key `ds_fp8`: tensors,
strings and numbers, safe under `torch.load(weights_only=True)`.

    {"version": 1, "plan": digest, "world_size": W, "books": [state, ...], "book_of_rank": [index, ...],
     "digests": [hash of each state, ...], "pending": [amaxes or None, ...], "save": stamp}

DeepSpeed writes the client state of one rank only. With `reduce_amax` all ranks hold the same state and one is stored;
without, and in a pipeline, states differ: each different one is stored once, with the ranks it belongs to. A save in
the middle of gradient accumulation finds amaxes that no update has taken up yet, each rank's its own: `pending`, by
rank.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ..errors import CheckpointError
from ..layers.fp8_state_loading import match_state
from ..optim.checkpointing import KEY
from ..zero.touched import touched
from .printing import print_rank_0

TOUCHED = {
    "Engine": touched(reads="global_steps"),
}

VERSION = 1


def add_state(attachment: Any, client_state: dict[str, Any], stamp: dict[str, Any]) -> dict[str, Any]:
    """The client state with our key added; the caller's dict is left alone. Collective: all ranks call it.

    stamp  of this save, see `checkpoint/stamp.py`
    """
    if KEY in client_state:
        raise CheckpointError(f"client_state already has a key {KEY!r}, which ds_fp8 keeps its own state under.")
    fp8_states, state_of_rank, pending = (
        ([], [], []) if attachment.fp8_state is None else _distinct(attachment.fp8_state.state_dict())
    )
    kept = {
        "version": VERSION,
        "plan": attachment.plan.digest(),
        "world_size": len(state_of_rank),
        "books": fp8_states,
        "book_of_rank": state_of_rank,
        "digests": [_fingerprint(state) for state in fp8_states],
        "save": stamp,
    }
    if any(amaxes is not None for amaxes in pending):
        kept["pending"] = pending
    return {**client_state, KEY: kept}


def take_state(attachment: Any, client_state: dict[str, Any], path: str) -> None:
    """Take our key out of a loaded client state and restore the FP8 state from it.

    A checkpoint of a run without the plugin has none: the scales start fresh, and one line says so.
    """
    kept = client_state.pop(KEY, None)
    fp8_state = attachment.fp8_state
    if fp8_state is None:
        return
    if kept is None or not kept["books"]:
        # The weights are other ones: quantized values made from the old ones are stale. The steps are those of the
        # checkpoint.
        fp8_state.weights_replaced(steps=attachment.engine.global_steps)
        print_rank_0(f"ds_fp8: {path} has no FP8 scales (written without the plugin); amax histories start fresh")
        return
    for note in fp8_state.load_state_dict(_own_state(kept, path)):
        print_rank_0(f"ds_fp8: {note}")
    attachment.mode.resume(attachment)


def check_state(attachment: Any, kept: Any, path: str) -> None:
    """Raise CheckpointError if `kept`, our entry of a model file, cannot be read; nothing is changed."""
    if kept is None:
        return
    _check_head(kept, path)
    if attachment.fp8_state is not None and kept["books"]:
        match_state(_own_state(kept, path), attachment.fp8_state)


def _check_head(kept: Any, path: str) -> None:
    if not isinstance(kept, dict) or not {"version", "books", "book_of_rank"} <= kept.keys():
        raise CheckpointError(f"{path}: the entry {KEY!r} of the client state was not written by ds_fp8.")
    for key, kind in (("version", int), ("books", list), ("book_of_rank", list)):
        if not isinstance(kept[key], kind):
            raise CheckpointError(f"{path}: {KEY}/{key} is a {type(kept[key]).__name__}, expected {kind.__name__}.")
    if kept["version"] > VERSION:
        raise CheckpointError(
            f"{path}: FP8 state of version {kept['version']}, this ds_fp8 reads up to {VERSION}. Upgrade ds_fp8."
        )
    count = len(kept["books"])
    if any(not isinstance(index, int) or not 0 <= index < count for index in kept["book_of_rank"]):
        raise CheckpointError(f"{path}: {KEY}/book_of_rank names scales that are not there; the entry is damaged.")
    if count and not kept["book_of_rank"]:
        raise CheckpointError(f"{path}: {KEY}/book_of_rank is empty; the entry is damaged.")
    digests = kept.get("digests")
    if "digests" in kept and digests != [_fingerprint(state) for state in kept["books"]]:
        raise CheckpointError(
            f"{path}: the scales and histories ({KEY}/books) are not those that were saved; the entry is damaged.\n"
            f"  Use another tag; or take {KEY} out of the file: the scales then start fresh."
        )
    pending = kept.get("pending", [])
    if "pending" in kept and (not isinstance(pending, list) or len(pending) != len(kept["book_of_rank"])):
        raise CheckpointError(f"{path}: {KEY}/pending is not one entry for each rank; the entry is damaged.")


def _own_state(kept: Any, path: str) -> Any:
    """This rank's state out of a checkpoint's; the first one if the world has another size."""
    _check_head(kept, path)
    rank, world_size = _world()
    state_of_rank = kept["book_of_rank"]
    if len(state_of_rank) == world_size:
        own = kept["books"][state_of_rank[rank]]
        pending = kept.get("pending", [None] * world_size)[rank]
        return own if pending is None else {**own, "pending": pending}
    if len(kept["books"]) > 1:
        print_rank_0(
            f"ds_fp8: {path} was written by {len(state_of_rank)} ranks with scales of their own; "
            f"all {world_size} ranks start from those of rank 0"
        )
    return kept["books"][state_of_rank[0]]


def _distinct(state: Any) -> tuple[list[Any], list[int], list[Any]]:
    """Every different state among the ranks, which one each rank has, and what is pending on each. Only different
    states are sent.
    """
    import deepspeed.comm as dist

    rank, world_size = _world()
    pending = state.pop("pending", None)
    if world_size == 1:
        return [state], [0], [pending]
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, (_fingerprint(state), pending))
    prints = [fingerprint for fingerprint, _ in found]
    owners: dict[str, int] = {}
    for other, fingerprint in enumerate(prints):
        owners.setdefault(fingerprint, other)
    fp8_states: list[Any] = [state] * world_size
    if len(owners) > 1:
        # Those that bring nothing new send nothing.
        dist.all_gather_object(fp8_states, state if rank in owners.values() else None)
    order = list(owners)
    return (
        [fp8_states[owners[fingerprint]] for fingerprint in order],
        [order.index(one) for one in prints],
        [amaxes for _, amaxes in found],
    )


def _fingerprint(value: Any) -> str:
    """A hash over nested dicts, lists, tensors and built-in values: equal states have equal fingerprints."""
    digest = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, dict):
            for key in sorted(item, key=str):
                digest.update(f"{key}:".encode())
                feed(item[key])
        elif isinstance(item, (list, tuple)):
            for element in item:
                feed(element)
        elif hasattr(item, "detach"):
            on_cpu = item.detach().cpu().contiguous()
            digest.update(f"{on_cpu.dtype}{tuple(on_cpu.shape)}".encode())
            digest.update(on_cpu.reshape(-1).view(dtype=_bytes_dtype()).numpy().tobytes())
        else:
            digest.update(repr(item).encode())

    feed(value)
    return digest.hexdigest()


def _bytes_dtype() -> Any:
    import torch

    return torch.uint8


def _world() -> tuple[int, int]:
    import deepspeed.comm as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
