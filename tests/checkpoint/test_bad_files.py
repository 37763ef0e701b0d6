"""A broken checkpoint is refused by all ranks, and the engine trains on as if nothing had been asked.

Truncated, foreign, newer, another stage, another world size: in each case DeepSpeed alone would have loaded the model's
weights before it noticed. The proof is in the weights: bit for bit what they were.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from states_jobs import batch_barrier, full_weights, job, load, train

from ds_fp8.errors import CheckpointError

pytestmark = pytest.mark.dist


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def edit(path: Path, change: Any) -> None:
    content = torch.load(path, weights_only=False)
    change(content["optimizer_state_dict"])
    torch.save(content, path)


def newer(shard: dict) -> None:
    shard["ds_fp8"]["version"] = 99


def foreign(shard: dict) -> None:
    shard["ds_fp8"] = {"somebody": "else"}


def other_model(shard: dict) -> None:
    shard["single_partition_of_fp32_groups"] = [torch.zeros(17)]


def other_world(shard: dict) -> None:
    shard["partition_count"] = [8]


def other_stage(shard: dict) -> None:
    shard["zero_stage"] = 3


# Damage to the shard of rank 1, and what the message must say.
DAMAGE = {
    "truncated": (truncate, "cannot be read"),
    "newer": (lambda path: edit(path, newer), "version 99"),
    "foreign": (lambda path: edit(path, foreign), "was not written by ds_fp8"),
    "other model": (lambda path: edit(path, other_model), "another model"),
    "other world": (lambda path: edit(path, other_world), "written by 8"),
    "other stage": (lambda path: edit(path, other_stage), "stage 3"),
    "missing": (lambda path: path.unlink(), "not there"),
}


def try_all(rank: int, world_size: int, folder: str) -> dict[str, tuple]:
    engine = job({"stage": 2, "level": "O2"})
    train(engine, range(1))
    good = Path(folder) / "good"
    engine.save_checkpoint(str(good), tag="a")
    train(engine, range(1, 2))
    results = {}
    for name, (damage, _) in DAMAGE.items():
        bad = Path(folder) / name
        if rank == 0:
            shutil.copytree(good, bad)
            damage(next((bad / "a").glob("*_rank_1_*_optim_states.pt")))
        batch_barrier()
        before = full_weights(engine)
        try:
            load(engine, str(bad))
            message = "loaded"
        except CheckpointError as error:
            message = str(error)
        results[name] = (message, torch.equal(before, full_weights(engine)))
    train(engine, range(2, 3))
    engine.destroy()
    return results


def test_every_rank_refuses_and_nothing_changes(tmp_path):
    for of_rank in run_ranks(2, try_all, str(tmp_path)):
        for name, (_, words) in DAMAGE.items():
            message, unchanged = of_rank[name]
            assert words in message, name
            assert unchanged, name
