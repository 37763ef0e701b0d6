"""A checkpoint of somebody who wishes us ill: `latest`, `verify` and `convert` run nothing of it, wait for nothing,
fill no memory, and say why it is refused. SECURITY.md promises it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fp8.checkpoint import complete, convert, saving
from ds_fp8.checkpoint.manifest import MANIFEST
from ds_fp8.cli.main import main

GOOD = {
    "global_steps": 3, "global_samples": 3, "skipped_steps": 0, "dp_world_size": 1, "mp_world_size": 1, "module": {},
    "optimizer": None, "ds_config": {"zero_optimization": {"stage": 0}},
}  # fmt: skip
MODEL = "mp_rank_00_model_states.pt"


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.place,)


def write(tag: Path, content: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """A model file as torch.save makes it; bytes: of that pickle."""
    tag.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        torch.save(content, tag / MODEL)
        return
    with zipfile.ZipFile(tag / MODEL, "w", compression) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")


def said(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    """What the command prints, which must not end in an error of Python's."""
    assert main([*map(str, arguments)]) in (0, 1, 2)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    return out + err


def every_command(capsys: pytest.CaptureFixture, folder: Path) -> str:
    commands = ("latest", "--repair"), ("verify",), ("convert", folder.with_name("out"))
    return "".join(said(capsys, command, folder, *more) for command, *more in commands)


def test_nothing_of_a_pickle_runs(tmp_path, capsys):
    """Neither through a class, nor through an opcode that calls by name."""
    made = tmp_path / "made"
    for name, content in {
        "class": {**GOOD, "x": Runs(made)},
        "opcode": f"(S'touch {made}'\nios\nsystem\n.".encode(),
    }.items():
        folder = tmp_path / name / "ckpt"
        write(folder / "step3", content)
        (folder / "latest").write_text("step3")
        every_command(capsys, folder)
        assert not made.exists(), name
    found = said(capsys, "convert", tmp_path / "class" / "ckpt", tmp_path / "other")
    assert "holds objects that loading would have to run" in found


def test_a_file_exchanged_after_the_check_runs_nothing(tmp_path, capsys, monkeypatch):
    """Whoever may write the folder has the time between our look and DeepSpeed's read."""
    made, folder = tmp_path / "made", tmp_path / "ckpt"
    write(folder / "step3", GOOD)
    (folder / "latest").write_text("step3")
    judge = convert._check_files

    def exchange(tag: Path, trusted: bool) -> None:
        judge(tag, trusted)
        write(tag, {**GOOD, "x": Runs(made)})

    monkeypatch.setattr(convert, "_check_files", exchange)
    before = dict(os.environ)
    assert "cannot be" in said(capsys, "convert", folder, tmp_path / "out")
    assert not made.exists()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({**GOOD, "global_steps": 10**6000}, ""),
        ({**GOOD, "dp_world_size": 10**9, "ds_config": {"zero_optimization": {"stage": 2}}}, "dp_world_size is no"),
        ({**GOOD, "mp_world_size": 10**5000}, "mp_world_size is no"),
        ({**GOOD, "ds_fp8": {"rank": 10**5000, "save": {"id": 7}}}, ""),
        (b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".", "no model file"),
        (b"(" * 300_000 + b".", "damaged"),
        (b"\x80\x04\x82\x01.", "damaged"),
    ],
    ids=["step", "ranks", "model-parallel", "rank", "deep", "marks", "extension"],
)
def test_numbers_and_depths_that_no_job_has(tmp_path, capsys, content, reason):
    write(tmp_path / "ckpt" / "step3", content)
    (tmp_path / "ckpt" / "latest").write_text("step3")
    assert reason in every_command(capsys, tmp_path / "ckpt")


def test_a_few_bytes_do_not_become_gigabytes(tmp_path, capsys, monkeypatch):
    """torch.save compresses nothing; a compressed pickle may stand for any size."""
    monkeypatch.setattr(complete, "MOST_INFLATED_BYTES", 1 << 20)
    blob = b"\x80\x04\x8e" + (1 << 24).to_bytes(8, "little") + bytes(1 << 24) + b"."
    write(tmp_path / "ckpt" / "step3", blob, zipfile.ZIP_DEFLATED)
    (tmp_path / "ckpt" / "latest").write_text("step3")
    assert "compressed: no file of torch.save" in every_command(capsys, tmp_path / "ckpt")


@pytest.mark.parametrize(
    "text",
    [
        '{"step": Infinity, "files": {}}',
        '{"step": 1, "files": {"a": {"bytes": 1e999}}}',
        "[" * 200_000,
        "[1]",
        json.dumps({"step": 1, "files": {"../../other": {"bytes": 1}}}),
        json.dumps({"step": 1, "files": {"/etc/passwd": {"bytes": 1}}}),
        json.dumps({"step": 1, "files": {"a\0b": {"bytes": 1}}}),
    ],
)
def test_manifests_that_no_save_writes(tmp_path, capsys, text):
    write(tmp_path / "ckpt" / "step3", GOOD)
    (tmp_path / "ckpt" / "step3" / MANIFEST).write_text(text)
    (tmp_path / "ckpt" / "latest").write_text("step3")
    assert "cannot be read" in every_command(capsys, tmp_path / "ckpt")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["latest", f"step3/{MANIFEST}", f"step3/{MODEL}", "step3/mp_rank_01_model_states.pt"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_no_pipe_is_waited_for_and_no_device_read(tmp_path, capsys, name, kind):
    folder = tmp_path / "ckpt"
    write(folder / "step3", GOOD)
    (folder / "latest").write_text("step3")
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    every_command(capsys, folder)


def test_names_that_a_terminal_would_obey(tmp_path, capsys):
    folder = tmp_path / "ckpt"
    write(folder / "step3", GOOD)
    write(folder / "\x1b]0;owned\x07", GOOD)
    (folder / "step3" / "x\x1b[2J.pt").write_bytes(b"PK\x03\x04 no archive")
    (folder / "latest").write_text("\x1b[2J")
    assert "\\x1b[2J.pt: cannot be read" in every_command(capsys, folder)
    config = tmp_path / "ds.json"
    config.write_text('{"train_batch_size": 1, "fp8": {"enabled": true, "recipe": "\\u001b[2J", "\\u001b[2J": 1}}')
    assert "\\x1b[2J" in said(capsys, "check", config)


def test_latest_does_not_lead_out_of_the_folder(tmp_path, capsys):
    write(tmp_path / "elsewhere", GOOD)
    write(tmp_path / "ckpt" / "step3", GOOD)
    for named in ("../elsewhere", str(tmp_path / "elsewhere")):
        (tmp_path / "ckpt" / "latest").write_text(named)
        assert "points out of the folder" in said(capsys, "convert", tmp_path / "ckpt", tmp_path / "out")


def test_a_link_in_a_shared_folder_is_not_written_through(tmp_path, monkeypatch):
    """The name beside the target is drawn at random, and made anew."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    monkeypatch.setattr(saving.secrets, "token_hex", lambda count: "known")
    (tmp_path / ".latest.known").symlink_to(precious)
    assert "cannot be written" in str(saving._replace(tmp_path / "latest", "step3"))
    assert precious.read_text() == "mine"
