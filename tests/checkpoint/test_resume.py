"""A resumed job is the uninterrupted job: the same losses, bit for bit.

Every stage and level, stochastic rounding included. The state that must survive is the quantized values, their scales,
the remainders of the masters, the step and the seed; an fp32 copy of the decoded state is *not* enough, as encoding it
again need not give the same quantized values.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import states_jobs
import torch
from ranks import run_ranks
from states_jobs import batch_barrier, full_weights, job, load, train

pytestmark = pytest.mark.dist

EXPANDED = {"exp_avg": "e4m3_expanded", "exp_avg_sq": "e4m3_expanded"}
LEVELS = {
    "O1": {"level": "O1"},
    "O2": {"level": "O2"},
    "O2-stochastic": {"level": "O2", "overrides": {"rounding": "stochastic"}},
    "O2-fp16-master": {"level": "O2", "overrides": {"master": "fp16"}},
    "O2-expanded": {"level": "O2", "overrides": {**EXPANDED, "rounding": "stochastic"}},
}
CASES = {f"stage{stage}-{name}": {"stage": stage, **case} for stage in (0, 1, 2, 3) for name, case in LEVELS.items()}
CASES["stage2-fp16"] = {"stage": 2, "dtype": "fp16", "level": "O2"}
CASES["stage0-fp16"] = {"stage": 0, "dtype": "fp16", "level": "O2"}
CASES["stage0-fp32"] = {"stage": 0, "dtype": "fp32", "level": "O2"}
CASES["stage1-fp32-sums"] = {"stage": 1, "level": "O2", "config": {"data_types": {"grad_accum_dtype": "fp32"}}}
CASES["stage2-offload"] = {
    "stage": 2,
    "level": "O2",
    "config": {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False},
}


def resume(rank: int, world_size: int, folder: str) -> dict[str, dict]:
    results = {}
    for name, case in CASES.items():
        place = f"{folder}/{name}"
        engine = job(case)
        train(engine, range(3))
        engine.save_checkpoint(place, tag="three")
        saved = full_weights(engine)
        expected = train(engine, range(3, 6))["losses"]
        engine.destroy()
        engine = job(case)
        load(engine, place)
        loaded = full_weights(engine)
        results[name] = {
            "expected": expected,
            "resumed": train(engine, range(3, 6))["losses"],
            "same weights": torch.equal(saved, loaded),
        }
        engine.destroy()
        batch_barrier()
        if rank == 0:
            shutil.rmtree(place)
    return results


@pytest.fixture(scope="module")
def results():
    with tempfile.TemporaryDirectory() as folder:
        yield run_ranks(2, resume, folder)


@pytest.mark.parametrize("name", CASES)
def test_losses_after_resume_are_bit_equal(results, name):
    for of_rank in results:
        assert of_rank[name]["same weights"]
        assert of_rank[name]["resumed"] == of_rank[name]["expected"]


def test_quantized_values_are_safe_to_load(tmp_path: Path):
    """Our entry in the shard holds tensors and built-in types only: `weights_only=True` reads it."""
    run_ranks(1, save_quantized, str(tmp_path))
    quantized = torch.load(tmp_path / "quantized.pt", weights_only=True)
    assert quantized["version"] == 1
    assert quantized["codes"][0]["version"] == 2
    assert quantized["layout"]["formats"]["exp_avg"] == "int8"


def save_quantized(rank: int, world_size: int, folder: str) -> None:
    engine = states_jobs.job({"stage": 2, "level": "O2"})
    train(engine, range(1))
    torch.save(engine.optimizer.state_dict()["ds_fp8"], f"{folder}/quantized.pt")
    engine.destroy()
