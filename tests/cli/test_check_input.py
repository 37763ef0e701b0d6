"""What `ds_fp8 check` reads: broken text named at its place, standard input, large files, any terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_fp8.cli.main import main


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"fp8": {"enabled": True}}', ":1:21: error: True is no JSON; write true, in lower case"),
        ('{"fp8": {"enabled": true, "margin": NaN}}', ":1:37: error: NaN is no JSON"),
        ('{"a": 1,\n "fp8": {"enabled": true}', ":1:1: error: this { is never closed"),
        ('{"fp8": {"enabled": true}}}', "closes nothing"),
        ('{"train_batch_size": 1e400}', ":1:22: error: 1e400 is beyond the largest double"),
        ("", "is empty"),
        ("\n", "is empty"),
        ("[]", "an object of keys {...}, this is a list"),
        ("null", "this is null"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested deeper"),
    ],
)
def test_broken_text_is_named_at_its_place(tmp_path, capsys, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert main(["check", str(path)]) == 2
    assert words in capsys.readouterr().out


def test_hjson_is_read_with_a_warning(tmp_path, capsys):
    """DeepSpeed reads comments, `json.load` of the Trainer and Accelerate does not."""
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8, # of all ranks\n "fp8": {"enabled": true}}')
    assert main(["check", str(path)]) == 0
    assert "hjson, but not JSON" in capsys.readouterr().out


def test_standard_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"train_batch_size": 8, "fp8": {"enabled": true, "margn": 1}}'))
    assert main(["check", "-"]) == 1
    assert "standard input:1:50: error: fp8/margn" in capsys.readouterr().out


def test_a_file_that_is_no_configuration_by_its_size(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text('{"x": "' + "a" * (5 << 20) + '"}')
    assert main(["check", str(path)]) == 2
    assert "at most 4 MiB" in capsys.readouterr().out


def test_keys_in_other_letters_on_an_ascii_terminal(tmp_path):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8, "größe": 1}', encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "ds_fp8.cli.main", "check", str(tmp_path / "ds.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "gr\\xf6\\xdfe: unknown key" in done.stdout, done.stderr


def test_thousands_of_unknown_keys_take_linear_time(tmp_path, capsys):
    """Each key is compared with the known ones only where lengths and letters allow it; places are found by
    bisection.
    """
    from ds_fp8.config import suggest

    path = tmp_path / "ds.json"
    path.write_text("{\n" + ",\n".join(f'"key_{number}": 1' for number in range(4000)) + ', "train_batch_size": 8}')
    calls = 0
    original = suggest.edit_distance

    def counted(left: str, right: str) -> int:
        nonlocal calls
        calls += 1
        return original(left, right)

    suggest.edit_distance = counted
    try:
        assert main(["check", str(path)]) == 0
    finally:
        suggest.edit_distance = original
    assert calls < 4000
    assert f"{path}:4001:1: warning: key_3999" in capsys.readouterr().out


def test_a_file_of_another_encoding_is_named_as_such(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text('{"fp8": {"enabled": true}}', encoding="utf-16")
    assert main(["check", str(path)]) == 2
    assert "is not text in UTF-8 (byte 0 is 0xff); save it as UTF-8" in capsys.readouterr().out


def test_a_pipe_is_read_like_a_file(tmp_path, capsys):
    """`ds_fp8 check <(jq ... ds.json)`: the shell puts the name of a pipe in place of a file's."""
    reader, writer = os.pipe()
    os.write(writer, b'{"train_batch_size": 8, "fp8": {"enabled": true}}')
    os.close(writer)
    assert main(["check", f"/dev/fd/{reader}"]) == 0
    os.close(reader)
    assert "ok: fp8" in capsys.readouterr().out


def test_the_schema_is_where_the_command_says(capsys):
    assert main(["schema"]) == 0
    path = capsys.readouterr().out.strip()
    assert Path(path).stat().st_size > 10_000
