"""One step for all ranks: threads stand for ranks, a real store for the process group's.

A rank's training may be ahead of another's, the signal may reach one rank or all, at other steps; whatever happens,
all ranks stop after the same step, or all go without.
"""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from ds_fp8.engine import agreed_step
from ds_fp8.engine.agreed_step import AgreedStep


class Rank(threading.Thread):
    """Trains in steps of a few ms. `barrier` is the collective of each step; None: ranks run free of one another."""

    def __init__(self, store, world_size, asks_at, steps=400, barrier=None, mute=False):
        super().__init__(daemon=True)
        self.done, self.steps, self.asks_at, self.barrier = 0, steps, asks_at, barrier
        self.stopped = None
        self.agreement = None if mute else AgreedStep(store, "test", world_size, lambda: self.done)

    def run(self):
        for _ in range(self.steps):
            if self.agreement is not None and self.done == self.asks_at:
                self.agreement.ask("15")
            time.sleep(random.uniform(0.001, 0.01))
            if self.barrier is not None:
                self.barrier.wait(20)
            self.done += 1
            verdict = None if self.agreement is None else self.agreement.at(self.done)
            if verdict is not None:
                self.stopped = (verdict.word, verdict.step)
                return


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(agreed_step, "POLL_S", 0.02)
    monkeypatch.setattr(agreed_step, "PATIENCE_S", 2.0)


def train(ranks):
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert not rank.is_alive(), "a rank hangs"
    return [rank.stopped for rank in ranks]


@pytest.mark.parametrize("lockstep", [True, False], ids=["collective in each step", "ranks run free"])
@pytest.mark.parametrize(
    "asks", [(20, None, None, None), (20, 21, 22, 30), (20, 20, 20, 20)], ids=["one", "scattered", "all"]
)
def test_all_ranks_stop_after_one_step(asks, lockstep):
    """Whoever is asked, and when: one step, later than the question, and nobody hangs in a collective."""
    barrier = threading.Barrier(len(asks)) if lockstep else None
    store = HashStore()
    stopped = train([Rank(store, len(asks), each, barrier=barrier) for each in asks])
    assert len(set(stopped)) == 1, stopped
    word, step = stopped[0]
    assert word == "15"
    assert step > 20


def test_through_a_tcp_store_with_connections_of_its_own():
    """The training's own connection may be held by somebody who waits: it does not keep the agreement up."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))

    def hold():
        with pytest.raises(RuntimeError):
            store.wait(["never"], timedelta(seconds=3))

    holder = threading.Thread(target=hold)
    ranks = [Rank(store, 2, each) for each in (5, None)]
    holder.start()
    start = time.monotonic()
    stopped = train(ranks)
    assert time.monotonic() - start < 3
    holder.join()
    assert len(set(stopped)) == 1 and stopped[0][1] is not None


def test_nobody_asks():
    assert train([Rank(HashStore(), 2, None, steps=20), Rank(HashStore(), 2, None, steps=20)]) == [None, None]


def test_a_rank_that_never_answers_ends_it_for_all():
    """No step is agreed on, and the others agree on that: none saves while another trains on."""
    store = HashStore()
    assert train([Rank(store, 3, 5), Rank(store, 3, None), Rank(store, 3, None, steps=5, mute=True)])[:2] == [
        ("15", None),
        ("15", None),
    ]


def test_a_second_round_after_one_that_did_not_leave():
    store = HashStore()
    ranks = [Rank(store, 2, 5), Rank(store, 2, None)]
    first = train(ranks)
    again = [Rank.__new__(Rank) for _ in ranks]
    for new, old in zip(again, ranks, strict=True):
        threading.Thread.__init__(new, daemon=True)
        new.__dict__.update(
            {key: old.__dict__[key] for key in ("done", "steps", "barrier", "agreement")}, asks_at=-1, stopped=None
        )
    again[1].asks_at = again[1].done + 5
    second = train(again)
    assert len(set(first)) == len(set(second)) == 1
    assert second[0][1] > first[0][1]
