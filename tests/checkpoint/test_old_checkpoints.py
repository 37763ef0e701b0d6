"""Checkpoints of earlier versions load, and training goes on from them to the last digit.

One archive for each kind of state that was ever written (`old_jobs.py` says how): FP8 layers alone, every level, every
ZeRO stage, range-expanded states with stochastic rounding and an fp16 master, O3's weights. The losses beside each
checkpoint are those of the version that wrote it.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

import old_jobs
import pytest
from ranks import run_ranks

pytestmark = pytest.mark.dist

ARCHIVES = Path(__file__).parents[1] / "data" / "checkpoints"


def resume(rank: int, world_size: int, folder: str) -> dict[str, list[float]]:
    resumed = {}
    for name, job in old_jobs.JOBS.items():
        engine = old_jobs.make_engine(job)
        path, _ = engine.load_checkpoint(f"{folder}/{name}", tag="three")
        assert path is not None, name
        resumed[name] = old_jobs.train(engine, range(3, 6))
        engine.destroy()
    return resumed


@pytest.fixture(scope="module")
def resumed():
    with tempfile.TemporaryDirectory() as folder:
        for name in old_jobs.JOBS:
            with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
                archive.extractall(f"{folder}/{name}", filter="data")
        yield run_ranks(1, resume, folder)[0]


@pytest.mark.parametrize("name", old_jobs.JOBS)
def test_an_old_checkpoint_goes_on_to_the_last_digit(resumed, name):
    with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
        losses = json.load(archive.extractfile("losses.json"))
    assert resumed[name] == losses
