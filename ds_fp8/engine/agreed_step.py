"""One step for all ranks: when to stop is agreed on through the process group's store.

Ranks hear a signal at different moments, or not at all: one may be in step 41 while another finishes step 40. Ranks
that save after different steps wait for each other for ever. A collective in every step would settle it and cost every
step; this costs one comparison until somebody asks:

    asked       a thread on every rank asks the store twice a second whether any rank wants to stop
    posted      if so it posts the first step after which *this* rank can stop; its training waits there from now on
    decided     the largest post is the step of all; a rank that waits at an earlier one trains on to it

The threads post whatever their training does, so nobody waits for a collective that another rank holds up. A rank
that posts nothing within `PATIENCE_S` (it died, it hangs, it was not armed) ends the round. Step or no step, the first
to write the verdict decides for all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

POLL_S = 0.5
PATIENCE_S = 30.0
NO_STEP = "none"


@dataclass(frozen=True)
class Verdict:
    """word   what the first asker wanted, the same on all ranks
    step   after which all stop; None when not every rank answered"""

    word: str
    step: int | None


class AgreedStep:
    """This rank's part of the agreement. `steps_done()` is read by the thread; it may only grow."""

    def __init__(self, store: Any, prefix: str, world_size: int, steps_done: Callable[[], int]):
        # A connection of its own: whoever waits on one holds it.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._prefix = prefix
        self._world_size = world_size
        self._steps_done = steps_done
        self._round = 0
        self._wish: str | None = None
        self._posted = False
        self._verdict: Verdict | None = None
        self._changed = threading.Condition()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ds_fp8 agreed step", daemon=True)
        self._thread.start()

    def ask(self, word: str) -> None:
        """This rank wants to stop. Only an assignment: it is called by a signal handler."""
        self._wish = word

    def close(self) -> None:
        self._end.set()

    def at(self, step: int) -> Verdict | None:
        """Called after every step. None: train on; else the verdict, if `step` is the step or there is none.

        Waits only after this rank has posted, and then for the other ranks' posts, at most about `PATIENCE_S`.
        """
        if not self._posted:
            if self._wish is not None and not self._thread.is_alive():
                return Verdict(self._wish, None)  # the store went, with rank 0: nobody can agree any more
            return None
        with self._changed:
            self._changed.wait_for(lambda: self._verdict is not None, 2 * PATIENCE_S)
            verdict = self._verdict or Verdict(self._wish or NO_STEP, None)
            if verdict.step is not None and step < verdict.step:
                return None
            self._round += 1
            self._wish, self._posted, self._verdict = None, False, None
            return verdict

    def _watch(self) -> None:
        while not self._end.wait(POLL_S):
            if self._posted:
                continue  # until training has taken the verdict
            try:
                if self._wish is not None:
                    self._store.compare_set(self._key("word"), "", self._wish)
                if not self._store.check([self._key("word")]):
                    continue
                word = self._store.get(self._key("word")).decode()
                self._posted = True  # before the step is read: from here on training waits at its next boundary
                decision = self._decide_together(self._steps_done() + 1)
            except RuntimeError:  # a lost store
                self._publish(Verdict(self._wish or NO_STEP, None))
                return
            self._publish(Verdict(word, None if decision == NO_STEP else int(decision)))

    def _publish(self, verdict: Verdict) -> None:
        with self._changed:
            self._verdict = verdict
            self._changed.notify_all()

    def _decide_together(self, mine: int) -> str:
        key, expected = self._key("largest"), ""
        while True:  # an atomic maximum, out of the one atomic operation that every store has
            found = self._store.compare_set(key, expected, str(mine)).decode()
            if int(found) >= mine:
                break
            expected = found
        decision = self._key("decision")
        if self._store.add(self._key("posts"), 1) == self._world_size:
            self._store.compare_set(decision, "", self._store.get(key).decode())
        try:
            self._store.wait([decision], timedelta(seconds=PATIENCE_S))
        except RuntimeError:
            self._store.compare_set(decision, "", NO_STEP)
        return self._store.get(decision).decode()

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{self._round}/{name}"


def agreed_step(name: str, steps_done: Callable[[], int]) -> AgreedStep | None:
    """None for one rank, which has nobody to agree with. RuntimeError for a process group without a store (MPI)."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = distributed_c10d._get_default_store()
    if store is None:
        raise RuntimeError("this process group has no store")
    return AgreedStep(store, f"ds_fp8/agreed_step/{name}", dist.get_world_size(), steps_done)
