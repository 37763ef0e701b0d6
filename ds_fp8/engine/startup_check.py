"""Startup check: are all ranks there, and do all have our sections? Asked through the process group's store, before any
collective.

A rank whose JSON has our sections is about to gather findings from all; a rank without them goes on to DeepSpeed's
first broadcast. Two different collectives on one group hang, or exchange each other's bytes. A store can be asked with
a time limit, so each rank leaves a word there first:

    with a section     its word, then wait until all have come
    without one        its word, and on; a few bytes for each engine, nothing is waited for

So a section that is missing on one node stops the others at once. A rank that says nothing is late, or has no plugin:
after `NOTICE_S` the others say whom they wait for, after `PATIENCE_S` they stop.
"""

from __future__ import annotations

import contextlib
import itertools
from datetime import timedelta
from typing import Any

from ..errors import PlanError

NOTICE_S = 5.0
PATIENCE_S = 120.0
"""Ranks that read a large model from a shared file system may come minutes apart; none of them may be turned away."""

SAME_JSON = "Give every node the same ds.json."

_engines = itertools.count()
"""Engines made by this process: the same number on all ranks means the same engine."""


def pass_by() -> None:
    """This rank's engine has none of our sections: leave the word and wait for nothing.

    Raises PlanError when another rank has said already that it has one; the store itself cannot make an unmodified job
    fail.
    """
    number, others, call = next(_engines), 0, None
    with contextlib.suppress(RuntimeError):
        call = _startup_check(number)
        if call is not None:
            call.leave_word("unmodified")
            others = call.count()
    if call is not None and others:
        raise PlanError(
            f"rank {call.rank} made a DeepSpeed engine without an fp8 or msamp section; {others} other"
            f"{' has' if others == 1 else 's have'} one.\n  {SAME_JSON}"
        )


def gather_ranks() -> None:
    """Return when all ranks have come to this engine with a section. Raises PlanError that names those who have not."""
    call = _startup_check(next(_engines))
    if call is None:
        return
    call.leave_word("section")
    if not call.wait(NOTICE_S):
        call.give_notice()
        if not call.wait(PATIENCE_S - NOTICE_S):
            raise PlanError(_absent(call))
    without_section = call.ranks_without_section()
    if without_section:
        raise PlanError(
            f"{names(without_section)} made a DeepSpeed engine without an fp8 or msamp section; rank {call.rank} has "
            f"one.\n  {SAME_JSON}"
        )


def _absent(call: _StartupCheck) -> str:
    return (
        f"{names(call.absent_ranks())} did not come within {PATIENCE_S:.0f} s, so rank {call.rank} stops: no plugin "
        "there, or another ds.json, or an error of their own.\n"
        "  Run `ds_fp8 doctor ds.json` on each node: it finds a missing activation hook and DS_FP8_DISABLE."
    )


class _StartupCheck:
    """Words of all ranks about one engine. `count` have a section, `without_section` none; `done` is set when waiting
    is over.
    """

    def __init__(self, store: Any, prefix: str, rank: int, world_size: int):
        self.store = store
        self.prefix = prefix
        self.rank = rank
        self.world_size = world_size

    def leave_word(self, word: str) -> None:
        self.store.set(self._key(self.rank), word)
        without_section = self.store.add(self._key("unmodified"), int(word == "unmodified"))
        count = self.store.add(self._key("count"), int(word == "section"))
        if without_section or count == self.world_size:
            self.store.set(self._key("done"), "1")

    def count(self) -> int:
        """Ranks that have come with a section."""
        return int(self.store.add(self._key("count"), 0))

    def wait(self, limit_s: float) -> bool:
        """False when the time has run out."""
        try:
            self.store.wait([self._key("done")], timedelta(seconds=limit_s))
        except RuntimeError:
            # A lost store says so here, by its own error; a store that answers has run out of time.
            return bool(self.store.check([self._key("done")]))
        return True

    def give_notice(self) -> None:
        """The first rank that is here tells whom all wait for."""
        absent = self.absent_ranks()
        if absent and self.rank == min(set(range(self.world_size)) - set(absent)):
            print(f"ds_fp8: waiting for {names(absent)} to make the same DeepSpeed engine", flush=True)

    def absent_ranks(self) -> list[int]:
        return [rank for rank in range(self.world_size) if not self.store.check([self._key(rank)])]

    def ranks_without_section(self) -> list[int]:
        if not self.store.add(self._key("unmodified"), 0):
            return []
        here = sorted(set(range(self.world_size)) - set(self.absent_ranks()))
        return [rank for rank in here if self.store.get(self._key(rank)) == b"unmodified"]

    def _key(self, name: Any) -> str:
        return f"{self.prefix}/{name}"


def _startup_check(number: int) -> _StartupCheck | None:
    """None for one rank, and for backends that have no store (MPI)."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = distributed_c10d._get_default_store()
    if store is None:
        return None
    return _StartupCheck(store, f"ds_fp8/engine{number}", dist.get_rank(), dist.get_world_size())


def names(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0, 2`; the first eight of many."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) != 1 else ''} {shown}"
