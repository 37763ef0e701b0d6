"""The commands in other people's hands: whatever they are given, a reason and an exit code, never a traceback."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time

import pytest

from ds_fp8.cli.main import main

FACTORIES = """
import sys
from torch import nn
def none(): return None
def text(): return "model"
def raises(): raise RuntimeError("boom")
def exits(): sys.exit(3)
def fine(): return nn.Sequential(nn.Linear(64, 64))
number = 5
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8, "bf16": {"enabled": true}, "fp8": {"enabled": true}}')
    (tmp_path / "factories_of_a_user.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories_of_a_user", raising=False)


@pytest.mark.parametrize("command", ["explain", "estimate"])
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("none", "returned NoneType, not a torch.nn.Module"),
        ("text", "returned str"),
        ("raises", "RuntimeError: boom"),
        ("exits", "ended Python with exit code 3"),
        ("number", "not callable"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_a_factory_that_makes_no_model(job, capsys, command, factory, words):
    more = ["--world-size", "2"] if command == "estimate" else []
    assert main([command, "ds.json", "--model", f"factories_of_a_user:{factory}", *more]) == 2
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("device", ["tpu", "h1000", "", "cuda:99", "mps"])
def test_a_device_that_is_none(job, capsys, device):
    assert main(["explain", "ds.json", "--model", "factories_of_a_user:fine", "--device", device]) == 1
    assert "a100, l40s, h100, h200, b200" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "five"])
def test_a_shard_without_a_size(size, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["convert", "from", "to", "--shard-gb", size])
    assert caught.value.code == 2 and "no size in GB" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    """Each command's help, within a second of Python's own start on a quiet machine; here: without torch."""
    code = (
        "import sys; from ds_fp8.cli.main import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    for command in ("check", "estimate", "report", "convert", "verify", "latest"):
        done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False", (command, done.stdout, done.stderr)


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("ds_fp8.cli.check.main", interrupted)
    assert main(["check", "x"]) == 130
    assert capsys.readouterr().err == "ds_fp8: interrupted\n"


@pytest.mark.parametrize("columns", ["20", "60", "200"])
def test_tables_on_any_width(job, columns):
    """COLUMNS as the shell sets it; on 20 columns text is folded, nothing is lost and nothing fails."""
    environment = {**os.environ, "COLUMNS": columns}
    command = [sys.executable, "-m", "ds_fp8.cli.main", "estimate", "ds.json", "--params", "7B", "--world-size", "8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "AMP" in done.stdout and "O3" in done.stdout


def test_what_is_written_has_the_mode_of_the_umask(tmp_path):
    """A report by umask 027: readable by the group, by nobody else."""
    pytest.importorskip("plotly", reason="needs the extra report")
    log = tmp_path / "telemetry_rank0.jsonl"
    log.write_text('{"event": "step", "step": 1, "loss": 1.0, "values": {}, "readings": []}\n')
    before = os.umask(0o027)
    try:
        assert main(["report", str(log), "-o", str(tmp_path / "out.html")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.html").stat().st_mode) == 0o640


def test_check_is_quick_with_thousands_of_unknown_keys(tmp_path):
    """2000 unknown keys: below .3 s of processor time above Python's own start and imports."""
    path = tmp_path / "ds.json"
    path.write_text(
        "{" + ", ".join(f'"unknown_key_{number}": 1' for number in range(2000)) + ', "train_batch_size": 8}'
    )
    main(["check", str(path)])
    started = time.process_time()
    assert main(["check", str(path)]) == 0
    assert time.process_time() - started < 0.3


def test_verify_shows_a_bar_on_a_terminal_alone(tmp_path, capsys):
    """Gigabytes are read: a terminal sees how far it is, a pipe sees the results only."""
    import pty

    torch = pytest.importorskip("torch")
    folder = tmp_path / "global_step1"
    folder.mkdir()
    torch.save({"module": {"weight": torch.zeros(10)}}, folder / "mp_rank_00_model_states.pt")
    assert main(["verify", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "global_step1: ok (by its files, no manifest)\n" and captured.err == ""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        assert main(["verify", str(tmp_path)]) == 0
    assert b"verifying" in os.read(ours, 10_000)
    os.close(ours)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("ds_fp8 explain - < ok.json", 0, "effective settings"),
        ("ds_fp8 estimate - --params 1B --world-size 2 < ok.json", 0, "standard input"),
        ("ds_fp8 explain - < /dev/null", 2, "is empty"),
        ("ds_fp8 check - <&-", 2, "is empty"),
        ("ds_fp8 explain ok.json > /dev/full", 2, "the output cannot be written"),
        ("ds_fp8 explain ok.json --world-size 0", 2, "at least 1"),
        ("ds_fp8 report deep.json", 2, "deep.json"),
        ("ds_fp8 latest ok.json", 2, "give the checkpoint folder"),
    ],
)
def test_what_a_stranger_tries_ends_with_a_reason(words, code, said, tmp_path):
    """Standard input, a full disk, a file for a folder, brackets without end: exit code and words, no traceback."""
    (tmp_path / "ok.json").write_text('{"train_batch_size": 1, "fp8": {"enabled": true}}')
    (tmp_path / "deep.json").write_text('{"a":' * 5000)
    words = words.replace("ds_fp8 ", f"{sys.executable} -m ds_fp8.cli.main ", 1).replace("standard input", "-")
    done = subprocess.run(["sh", "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and said.replace("standard input", "-: ") in done.stdout + done.stderr
