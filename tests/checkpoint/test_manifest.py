"""A complete checkpoint or none: `latest` never names half of one, whatever ends the save, and `verify` finds every
change.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import old_jobs
import pytest
from ranks import run_ranks
from test_integrity import JOB, MODEL, edit, flip, shard

from ds_fp8.checkpoint.complete import look, named_by_latest, tags
from ds_fp8.checkpoint.manifest import MANIFEST, UNFINISHED
from ds_fp8.cli.main import main

pytestmark = pytest.mark.dist


def save_twice(rank: int, world_size: int, folder: str) -> None:
    """Tags `a`, `b`; then on a full disk `c`: refused on both ranks, `latest` still names `b`."""
    import os

    from ds_fp8.errors import CheckpointError

    engine = old_jobs.make_engine(JOB)
    for number, tag in enumerate("ab"):
        old_jobs.train(engine, range(number, number + 1))
        engine.save_checkpoint(folder, tag=tag)
    engine.save_checkpoint(folder, tag="aside", save_latest=False)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    original, os.fsync = os.fsync, full
    try:
        with pytest.raises(CheckpointError, match="No space left"):
            engine.save_checkpoint(folder, tag="c")
    finally:
        os.fsync = original


def die_in_the_shard(rank: int, world_size: int, folder: str, tag: str) -> None:
    """Rank 1 ends while it writes its optimizer shard."""
    engine = old_jobs.make_engine(JOB)
    old_jobs.train(engine, range(2))
    if rank == 1:
        writer = engine.checkpoint_engine
        original = writer.save

        def save(state, path, *args, **kwargs):
            if "optim_states" in path:
                raise SystemExit("killed")
            return original(state, path, *args, **kwargs)

        writer.save = save
    engine.save_checkpoint(folder, tag=tag)


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    run_ranks(2, save_twice, str(folder))
    return folder


@pytest.fixture
def saved(two_saves, tmp_path):
    shutil.copytree(two_saves, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def test_the_manifest_lists_every_file_of_every_rank(saved):
    manifest = json.loads((saved / "b" / MANIFEST).read_text())
    assert manifest["step"] == 2 and len(manifest["save_id"]) == 16
    assert {shard(0), shard(1), "mp_rank_00_model_states.pt"} == manifest["files"].keys()
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (saved / "b" / name).stat().st_size
    assert named_by_latest(saved) == "b", "neither `aside`, which did not ask for it, nor `c`, which is not complete"
    assert [(each.tag, each.complete) for each in sorted(tags(saved), key=lambda each: each.tag)] == [
        ("a", True),
        ("aside", True),
        ("b", True),
        ("c", False),
    ]


@pytest.mark.parametrize("tag", ["new", "b"])
def test_a_rank_killed_in_its_shard(saved, tag):
    """A new tag, or an old one written over: it is not complete, and `latest` does not begin to name it."""
    with pytest.raises(Exception, match=r"killed|Connection|closed"):
        run_ranks(2, die_in_the_shard, str(saved), tag)
    assert (saved / tag / UNFINISHED).exists() and not (saved / tag / MANIFEST).exists()
    assert not look(saved / tag).complete
    assert named_by_latest(saved) == "b"
    assert main(["latest", str(saved), "--repair"]) == 0
    assert named_by_latest(saved) == ("b" if tag == "new" else "aside")


def test_verify_finds_what_nobody_sees(saved, capsys):
    """A flipped bit, a file of another save, one byte less, a file that is gone; the healthy ones are ok."""
    assert main(["verify", str(saved), "--tag", "b"]) == 0
    flip(saved / "a" / shard(1), 0)
    shutil.copy(saved / "a" / shard(0), saved / "b" / shard(0))
    (saved / "aside" / shard(0)).unlink()
    capsys.readouterr()
    assert main(["verify", str(saved), "--json"]) == 2
    faults = {each["tag"]: " ".join(each["faults"]) for each in json.loads(capsys.readouterr().out)}
    assert "CRC32" in faults["a"]
    assert "another save's" in faults["b"]
    assert "missing" in faults["aside"]
    assert main(["verify", str(saved / "nothing")]) == 2


def test_a_tag_written_over_by_a_job_without_the_plugin(saved):
    """DeepSpeed alone knows no manifest: the old one speaks of files that are gone, and must not condemn the new
    ones.
    """
    for number, name in enumerate((shard(0), shard(1), MODEL)):
        edit(saved / "b" / name, without_our_entries)
        assert look(saved / "b").complete == (number == 2), "files of two saves, until the last one is written"


def without_our_entries(content):
    content.pop("ds_fp8", None)
    content.get("optimizer_state_dict", {}).pop("ds_fp8", None)


def test_a_tag_whose_files_were_all_saved_anew_is_not_the_one_of_its_manifest(saved):
    """They name a save of ours: no job without ds_fp8 has written them."""
    for name in (shard(0), shard(1), MODEL):
        edit(saved / "b" / name, lambda content: content.update(more="x"))
    assert not look(saved / "b").complete


@pytest.mark.parametrize("level", ["O3", "plain"])
def test_a_converted_checkpoint_has_a_manifest_of_its_own(saved, tmp_path, level):
    assert main(["convert", str(saved), str(tmp_path / level), "--level", level]) == 0
    assert main(["verify", str(tmp_path / level)]) == 0
    assert (tmp_path / level / "latest").read_text() == "b"


def test_convert_runs_no_foreign_pickle(saved, tmp_path, capsys):
    """A checkpoint from somebody else may hold any object; it is refused with exit code 2, unless it is trusted."""
    ran = tmp_path / "ran"
    edit(saved / "b" / shard(0), lambda content: content.update(evil=Evil(ran)))
    (saved / "b" / MANIFEST).unlink()  # it belongs to another file
    assert main(["convert", str(saved), str(tmp_path / "out")]) == 2
    assert "--trust-pickle" in capsys.readouterr().err and not ran.exists()
    assert main(["convert", str(saved), str(tmp_path / "out"), "--trust-pickle"]) == 0
    assert ran.exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("damage", ["truncated", "no optimizer state", "a list", "latest is empty"])
def test_convert_says_what_is_wrong(saved, tmp_path, capsys, damage):
    file = saved / "b" / shard(1)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "latest is empty":
        (saved / "latest").write_text("")
    else:
        import torch

        torch.save([1] if damage == "a list" else {"x": 1}, file)
    for number, more in enumerate(([], ["--level", "O3"])):
        assert main(["convert", str(saved), str(tmp_path / f"out{number}"), *more]) == 2
        assert "ds_fp8 convert: " in capsys.readouterr().err
        assert not (tmp_path / f"out{number}" / "latest").exists()
