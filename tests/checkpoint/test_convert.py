"""`ds_fp8 convert`: the model's own names, master precision, and levels that a job takes as its own."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from states_jobs import full_weights, job, load, train

from ds_fp8.checkpoint.reading import read_tensors
from ds_fp8.cli import convert as command

pytestmark = pytest.mark.dist

STAGES = (0, 2, 3)


def save_stages(rank: int, world_size: int, folder: str) -> dict:
    results = {}
    for stage in STAGES:
        engine = job({"stage": stage, "level": "O2"})
        train(engine, range(2))
        engine.save_checkpoint(f"{folder}/{stage}", tag="a")
        names = [name for name, _ in engine.module.named_parameters()]
        results[stage] = {"weights": full_weights(engine), "names": names}
        engine.destroy()
    return results


def continue_at(rank: int, world_size: int, folder: str, level: str) -> list:
    engine = job({"stage": 2, "level": level})
    load(engine, folder)
    losses = train(engine, range(2, 4))["losses"]
    engine.destroy()
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, save_stages, str(folder))[0]


@pytest.mark.parametrize("stage", STAGES)
def test_safetensors_hold_the_masters(saved, tmp_path, stage):
    """fp32 under the model's own names; rounded to bf16 they are the model's weights."""
    folder, results = saved
    assert command.main([str(folder / str(stage)), str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert set(weights) >= set(results[stage]["names"])
    flat = torch.cat([weights[name].reshape(-1) for name in results[stage]["names"]])
    assert flat.dtype == torch.float32
    assert not torch.equal(flat, results[stage]["weights"])
    assert torch.allclose(flat, results[stage]["weights"], rtol=2**-8, atol=0)


def test_large_models_are_cut_into_files(saved, tmp_path):
    folder, _ = saved
    assert command.main([str(folder / "2"), str(tmp_path / "out"), "--dtype", "bf16", "--shard-gb", "3e-6"]) == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


def test_levels(saved, tmp_path):
    """Converted to O1 and loaded at O1 is loaded at O1 from O2: the same decoded state, so the same losses."""
    folder, _ = saved
    assert command.main([str(folder / "2"), str(tmp_path / "one"), "--level", "O1"]) == 0
    shard = read_tensors(next((tmp_path / "one" / "a").glob("*_optim_states.pt")))
    assert shard["optimizer_state_dict"]["ds_fp8"]["layout"]["formats"]["exp_avg"] == "fp32"
    converted = run_ranks(2, continue_at, str(tmp_path / "one"), "O1")[0]
    assert converted == run_ranks(2, continue_at, str(folder / "2"), "O1")[0]


def test_lossy_levels(saved, tmp_path):
    """From O1's fp32 states to O2's eight bits: the fp32 values beside them are finer, and the job takes them all the
    same.
    """
    folder, _ = saved
    assert command.main([str(folder / "2"), str(tmp_path / "one"), "--level", "O1"]) == 0
    assert command.main([str(tmp_path / "one"), str(tmp_path / "two"), "--level", "O2"]) == 0
    assert all(loss < 100 for loss in run_ranks(2, continue_at, str(tmp_path / "two"), "O2")[0])


def test_level_plain_has_nothing_of_ours(saved, tmp_path):
    folder, _ = saved
    assert command.main([str(folder / "3"), str(tmp_path / "plain"), "--level", "plain"]) == 0
    for path in (tmp_path / "plain" / "a").glob("*_optim_states.pt"):
        assert "ds_fp8" not in read_tensors(path)["optimizer_state_dict"]
    for _ in range(2):  # a refusal leaves nothing that a second try would stumble over
        assert command.main([str(tmp_path / "plain"), str(tmp_path / "again"), "--level", "O2"]) == 2
        assert not list((tmp_path / "again").iterdir())


def test_mistakes_are_named(tmp_path, capsys):
    assert command.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "latest" in capsys.readouterr().err


def test_a_folder_without_latest_says_what_is_wrong_with_it(tmp_path, capsys):
    """`--tag` helps only where there is a tag to name; else the folder is the wrong one."""

    def reason(folder) -> str:
        assert command.main([str(folder), str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    empty, file, named, universal = (tmp_path / name for name in ("empty", "file", "named", "universal"))
    (empty / "notes").mkdir(parents=True)
    file.write_text("x")
    (named / "step7").mkdir(parents=True)
    (named / "step7" / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    (universal / "u" / "zero").mkdir(parents=True)
    assert "a file" in reason(file)
    assert "no checkpoint of DeepSpeed there" in reason(empty) and "--tag" not in reason(empty)
    assert "name one of step7 with --tag" in reason(named)
    assert "universal checkpoint" in reason(universal)
