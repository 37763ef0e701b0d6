"""Do all ranks ask for the same thing now? Asked of the process group's store, before a collective that one rank may
start alone.

`model.state_dict()` is local in ZeRO 1 and 2, so scripts call it on rank 0 alone. At O3 the 16-bit weights are spread
over the ranks: bringing them back is a collective, and one that only some ranks enter is a hang. A store can be asked
with a time limit. Each rank that comes says so; the last one opens the meeting, and a rank that has waited too long
closes it. Whichever word is first counts, for all of them: nobody enters a collective that another one has given up.

A meeting belongs to a moment (the number of steps so far, the same on all ranks) and has a number within it.
"""

from __future__ import annotations

import contextlib
import hashlib
from datetime import timedelta
from typing import Any

import torch
from deepspeed import comm as dist

from .route import group_ranks

PATIENCE_S = 15.0
"""Ranks come from the same step; they are apart by what a script does between two of them."""


class Meeting:
    """Meetings of one group about one subject.

    subject  names it in the store, together with the group's ranks; equal on all ranks
    """

    def __init__(self, subject: str, group: Any):
        self.ranks = group_ranks(group)
        digest = hashlib.sha256(repr(self.ranks).encode()).hexdigest()[:12]
        self.prefix = f"ds_fp8/meeting/{subject}/{digest}"
        self.count = 0
        self.moment = -1

    def absent(self, moment: int, patience_s: float = PATIENCE_S) -> tuple[int, ...]:
        """Global ranks that did not come; empty when all of them are here, which then holds on every rank.

        A rank that comes to a meeting that was given up does not wait.
        """
        store = _store()
        if store is None or len(self.ranks) == 1:
            return ()
        if moment != self.moment:
            self.moment, self.count = moment, 0
        key, self.count = f"{self.prefix}/{moment}/{self.count}", self.count + 1
        store.set(f"{key}/{dist.get_rank()}", "here")
        word = "open"
        if store.add(f"{key}/count", 1) < len(self.ranks):
            # A lost store says so in the next line, by its own error; a store that answers has run out of time.
            with contextlib.suppress(RuntimeError):
                store.wait([f"{key}/word"], timedelta(seconds=patience_s))
            word = "given up"
        if store.compare_set(f"{key}/word", "", word) == b"open":
            return ()
        missing = tuple(rank for rank in self.ranks if not store.check([f"{key}/{rank}"]))
        return missing or tuple(rank for rank in self.ranks if rank != dist.get_rank())


def _store() -> Any | None:
    """None where the process group has no store to ask (MPI)."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed.distributed_c10d._get_default_store()
