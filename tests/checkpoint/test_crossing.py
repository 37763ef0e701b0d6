"""A checkpoint is nobody's prison: plugin off, plugin on, other level, other world size, other stage.

Whatever is loaded goes through fp32 flats under DeepSpeed's own names. With O1 (fp32 states, exact masters) nothing is
lost on the way, so the losses after each crossing must be those of the job that never stopped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from ranks import run_ranks
from states_jobs import full_weights, job, load, train

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BEFORE, AFTER = range(3), range(3, 6)


def save(rank: int, world_size: int, folder: str, stage: int, ours: bool, level: str = "O1") -> dict:
    """Train, save, train on: what a resumed job has to give."""
    engine = job({"stage": stage, "level": level}, ours=ours)
    train(engine, BEFORE)
    engine.save_checkpoint(folder, tag="a")
    weights = full_weights(engine)
    names = [name for name, _ in engine.module.named_parameters()]
    result = {"losses": train(engine, AFTER)["losses"], "weights": weights, "names": names}
    engine.destroy()
    return result


def resume(
    rank: int, world_size: int, folder: str, tag: str, stage: int, ours: bool, level: str, universal: bool
) -> list:
    engine = job({"stage": stage, "level": level}, ours=ours, universal=universal)
    if ours:
        load(engine, folder, tag)
    else:
        engine.load_checkpoint(folder, tag)
    losses = train(engine, AFTER)["losses"]
    engine.destroy()
    return losses


def round_trips(rank: int, world_size: int, folder: str) -> dict[str, tuple]:
    results = {}
    for stage in (0, 1, 2, 3):
        for ours in (True, False):
            place = f"{folder}/{stage}-{ours}"
            expected = save(rank, world_size, place, stage, ours)["losses"]
            found = resume(rank, world_size, place, "a", stage, not ours, "O1", False)
            results[f"stage {stage}, plugin {'off' if ours else 'on'}"] = (expected, found)
    expected = save(rank, world_size, f"{folder}/level", 2, True, "O1")["losses"]
    results["O2 from O1"] = (expected, resume(rank, world_size, f"{folder}/level", "a", 2, True, "O2", False))
    return results


def test_plugin_off_and_on(tmp_path):
    """Ours into unmodified DeepSpeed, unmodified DeepSpeed into ours, stages 0 to 3: the same losses as without the
    change.
    """
    for of_rank in run_ranks(2, round_trips, str(tmp_path)):
        for name, (expected, found) in of_rank.items():
            if name == "O2 from O1":
                # Moments become 8-bit values: three steps at lr 1e-2 may drift by some per cent of the loss.
                assert found == pytest.approx(expected, rel=0.05)
            else:
                assert found == expected, name


def into_every_stage(rank: int, world_size: int, folder: str) -> dict[int, list]:
    return {stage: resume(rank, world_size, folder, "u", stage, True, "O1", True) for stage in (1, 2, 3)}


def to_universal(folder: Path) -> None:
    """DeepSpeed's own converter, tag `a` into tag `u`."""
    convert = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    convert += ["--input_folder", f"{folder}/a", "--output_folder", f"{folder}/u"]
    convert += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(convert, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_universal_into_any_stage_and_world(tmp_path, stage):
    """Converted by DeepSpeed's own tool; loaded in every stage, and by one rank where two had saved."""
    saved = run_ranks(2, save, str(tmp_path), stage, True)[0]
    to_universal(tmp_path)
    for other, found in run_ranks(2, into_every_stage, str(tmp_path))[0].items():
        assert found == pytest.approx(saved["losses"], rel=1e-6), f"stage {stage} into {other}"
    if stage == 2:
        alone = run_ranks(1, resume, str(tmp_path), "u", 2, True, "O1", True)[0]
        # One rank sees its own half of the batches: only the first loss, before any new step, is the same.
        assert alone[0] == pytest.approx(saved["losses"][0], rel=1e-6)

    state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "a")
    flat = torch.cat([state[name].reshape(-1) for name in saved["names"]])
    # Masters in fp32, weights in bf16: half a unit of bf16 apart at most.
    assert torch.allclose(flat, saved["weights"], rtol=2**-8, atol=2**-20)


def states_of(engine) -> dict[str, torch.Tensor]:
    """Masters and moments of the whole model, as DeepSpeed's own getters give them."""
    params = list(engine.module.parameters())
    states = {key: [safe_get_full_optimizer_state(p, key) for p in params] for key in ("exp_avg", "exp_avg_sq")}
    states["master"] = [safe_get_full_fp32_param(p) for p in params]
    return {key: torch.cat([tensor.float().reshape(-1) for tensor in tensors]) for key, tensors in states.items()}


def there_and_back(rank: int, world_size: int, folder: str) -> dict[int, dict]:
    """bf16 of unmodified DeepSpeed, three steps at O2, and unmodified DeepSpeed again."""
    results = {}
    for stage in (1, 2, 3):
        start, middle = f"{folder}/{stage}", f"{folder}/{stage}-O2"
        uninterrupted = save(rank, world_size, start, stage, False)
        engine = job({"stage": stage, "level": "O2"})
        load(engine, start, "a")
        result = {"uninterrupted": uninterrupted, "loaded": full_weights(engine)}
        result["losses"] = train(engine, AFTER)["losses"]
        engine.save_checkpoint(middle, tag="a")
        result["given"] = states_of(engine)
        engine.destroy()
        engine = job({"stage": stage, "level": "O2"}, ours=False)
        engine.load_checkpoint(middle, "a")
        # DeepSpeed links its fragments to states in the first step; the flats have them before.
        result["master"] = torch.cat([safe_get_full_fp32_param(p).reshape(-1) for p in engine.module.parameters()])
        result["back"] = train(engine, range(6, 8))["losses"]
        engine.destroy()
        results[stage] = result
    return results


def test_bf16_into_o2_and_back_to_deepspeed(tmp_path):
    for of_rank in run_ranks(2, there_and_back, str(tmp_path)):
        for stage, result in of_rank.items():
            # A master near the middle between two bf16 numbers rounds half up in 24 bits, half to even in DeepSpeed.
            loaded, weights = result["loaded"], result["uninterrupted"]["weights"]
            assert torch.allclose(loaded, weights, rtol=2**-7, atol=0), stage
            assert (loaded != weights).float().mean() < 0.01, stage
            assert result["losses"] == pytest.approx(result["uninterrupted"]["losses"], rel=0.05), stage
            assert torch.equal(result["master"], result["given"]["master"]), stage
            assert max(result["back"]) < 2 * max(result["losses"]), stage


def load_universal(rank: int, world_size: int, folder: str, stage: int) -> dict:
    engine = job({"stage": stage, "level": "O2"}, universal=True)
    load(engine, folder, "u")
    result = {"weights": full_weights(engine), **states_of(engine)}
    result["losses"] = train(engine, AFTER)["losses"]
    engine.destroy()
    return result


@pytest.mark.parametrize("stage", (2, 3))
def test_four_ranks_into_two_at_o2(tmp_path, stage):
    """The 16-bit weights to the bit; rank 0 sees its old batch, so its first loss is the one it would have had."""
    saved = run_ranks(4, save, str(tmp_path), stage, True, "O2")[0]
    to_universal(tmp_path)
    for rank, found in enumerate(run_ranks(2, load_universal, str(tmp_path), stage)):
        assert torch.equal(found["weights"], saved["weights"])
        assert found["exp_avg"].abs().sum() > 0
        assert (found["exp_avg_sq"] > 0).any()
        if rank == 0:
            assert found["losses"][0] == pytest.approx(saved["losses"][0], rel=1e-6)
