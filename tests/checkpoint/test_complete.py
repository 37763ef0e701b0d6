"""The newest complete checkpoint: real ones of every stage, and what a killed rank or a full disk leaves of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ds_fp8.checkpoint.complete import look, named_by_latest, tags
from ds_fp8.checkpoint.manifest import MANIFEST
from ds_fp8.cli.main import main

ARCHIVES = Path(__file__).parents[1] / "data" / "checkpoints"
KINDS = sorted(path.name.removesuffix(".tar.xz") for path in ARCHIVES.glob("*.tar.xz"))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    for name in KINDS:
        with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
            archive.extractall(folder / name, filter="data")
    return folder


@pytest.fixture
def saved(archives, tmp_path):
    """Tags global_step1 to 3 of a ZeRO-2 job, `latest` names the last; copies of one real checkpoint."""
    for step in (1, 2, 3):
        shutil.copytree(archives / "stage2_O2_delayed" / "three", tmp_path / f"global_step{step}")
    (tmp_path / "latest").write_text("global_step3")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_real_checkpoints_are_complete(archives, kind):
    """Every stage and level, judged by its files alone; the step is the one in the model file, not in the name."""
    found = look(archives / kind / "three")
    assert found.faults == ()
    assert found.step == 3


def test_a_missing_shard_by_what_the_model_file_says(archives, tmp_path):
    """Written by two ranks, one shard there: the model file knows how many there ought to be."""
    tag = tmp_path / "global_step3"
    shutil.copytree(archives / "stage2_O2_delayed" / "three", tag)
    model = next(tag.glob("mp_rank_*_model_states.pt"))
    import torch

    content = torch.load(model, weights_only=False)
    content["dp_world_size"] = 2
    torch.save(content, model)
    assert look(tag).faults == ("optimizer shards of rank 1 of 2 are missing",)


DAMAGES = {
    "no shard": lambda tag: next(tag.glob("*_optim_states.pt")).unlink(),
    "truncated shard": lambda tag: cut(next(tag.glob("*_optim_states.pt"))),
    "empty model file": lambda tag: next(tag.glob("mp_rank_*_model_states.pt")).write_bytes(b""),
    "truncated model file": lambda tag: cut(next(tag.glob("mp_rank_*_model_states.pt"))),
    "no model file": lambda tag: next(tag.glob("mp_rank_*_model_states.pt")).unlink(),
}


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_one_is_passed_over(saved, damage, capsys):
    """`latest` names it, a complete one lies beside it: that one is found, and why is reported."""
    DAMAGES[damage](saved / "global_step3")
    assert main(["latest", str(saved)]) == 0
    said = capsys.readouterr()
    assert said.out == "global_step2\n"
    assert "passed over global_step3: " in said.err
    assert named_by_latest(saved) == "global_step3", "nothing is changed unless asked for"
    assert main(["latest", str(saved), "--repair"]) == 0
    assert named_by_latest(saved) == "global_step2"


@pytest.mark.parametrize("latest", ["", "global_step9", None])
def test_a_latest_that_helps_nobody(saved, latest, capsys):
    """Empty after a full disk, naming what is gone, or absent."""
    (saved / "latest").unlink() if latest is None else (saved / "latest").write_text(latest)
    assert main(["latest", str(saved), "--repair"]) == 0
    assert capsys.readouterr().out.split() == [tags(saved)[0].tag]
    assert named_by_latest(saved) == tags(saved)[0].tag


def test_a_complete_older_one_that_latest_names_is_meant(saved, capsys):
    """Whoever turned back to an older checkpoint meant it."""
    (saved / "latest").write_text("global_step2")
    assert main(["latest", str(saved), "--repair"]) == 0
    assert capsys.readouterr().out == "global_step2\n"


def test_nothing_yet_and_nothing_whole(tmp_path, saved, capsys):
    assert main(["latest", str(tmp_path / "none")]) == 0
    said = capsys.readouterr()
    assert said.out == "\n" and "no such folder yet" in said.err
    for tag in saved.glob("global_step*"):
        DAMAGES["truncated shard"](tag)
    assert main(["latest", str(saved)]) == 1
    assert "no complete checkpoint" in capsys.readouterr().err


def test_a_manifest_decides(saved):
    """What it lists is there with its size: complete, whatever the names; one byte less: not."""
    tag = saved / "global_step3"
    files = {file.name: {"bytes": file.stat().st_size} for file in tag.iterdir()}
    (tag / MANIFEST).write_text(json.dumps({"version": 1, "step": 30, "files": files}))
    assert (look(tag).faults, look(tag).step) == ((), 30)
    cut(next(tag.glob("*_optim_states.pt")))
    assert "the manifest says" in look(tag).faults[0]
    (tag / MANIFEST).write_text("{")
    assert "cannot be read" in look(tag).faults[0]


def test_a_hostile_pickle_is_not_run(saved):
    """A checkpoint may come from anywhere; looking at it must not run it."""
    import torch

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (saved / "ran",))

    model = next((saved / "global_step3").glob("mp_rank_*_model_states.pt"))
    content = torch.load(model, weights_only=False)
    torch.save({**content, "x": Hostile()}, model)
    assert look(saved / "global_step3").faults == ()
    assert not (saved / "ran").exists()


def test_it_needs_no_torch():
    code = (
        "import ds_fp8.checkpoint.complete, ds_fp8.cli.latest, sys; "
        "print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_verify_one_tag_and_a_universal_one(saved, capsys):
    """`verify` takes a tag's own folder, and finds what a conversion that was broken off has left out."""
    source, converted = saved / "global_step3", saved / "global_step3_universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(converted)]
    subprocess.run(command, check=True, capture_output=True)
    assert main(["verify", str(source)]) == 0 and main(["verify", str(converted)]) == 0
    assert main(["verify", str(saved)]) == 0
    assert "global_step3_universal: ok" in capsys.readouterr().out

    (converted / "zero" / "0.weight" / "exp_avg.pt").unlink()
    shutil.rmtree(converted / "zero" / "0.bias")
    cut(converted / "zero" / "1.weight" / "fp32.pt")
    (converted / "zero" / "optimizer_state.pt").unlink()
    assert main(["verify", str(saved), "--json"]) == 2
    found = {each["tag"]: each["faults"] for each in json.loads(capsys.readouterr().out)}
    faults = found.pop("global_step3_universal")
    assert faults[:3] == [
        "zero/optimizer_state.pt is missing",
        "zero/0.weight/exp_avg.pt is missing or empty",
        "zero/0.bias is missing",
    ]
    assert "zero/1.weight/fp32.pt: cannot be read: truncated" in faults[3] and len(faults) == 4
    assert not any(found.values())
    assert main(["verify", str(converted)]) == 2
    assert main(["latest", str(saved)]) == 0, "it is loaded by another key, and is nobody's latest"


def test_convert_takes_one_tag(saved, capsys):
    """A tag's folder is enough; garbage in `latest` and a universal checkpoint are exit code 2 with the reason."""
    assert main(["convert", str(saved / "global_step2"), str(saved / "out")]) == 0
    (saved / "latest").write_bytes(b"\xff\x00")
    assert main(["convert", str(saved), str(saved / "other")]) == 2
    assert "empty or garbage" in capsys.readouterr().err
    (saved / "global_step1" / "zero").mkdir()
    assert main(["convert", str(saved), str(saved / "other"), "--tag", "global_step1"]) == 2
    assert "universal" in capsys.readouterr().err
