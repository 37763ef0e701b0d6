"""`ds_fp8 check`: lines that editors turn into links, exit codes that scripts act on, JSON that machines read."""

from __future__ import annotations

import json

import pytest

from ds_fp8.cli.main import main

BAD = """{
  // two of ours, one of DeepSpeed's
  "train_batch_size": 8,
  "fp8": {"enabled": true, "margn": 1},
  "msamp": {"enabled": true, "opt_level": "O4"},
  "zero_optimization": {"stage": 2, "reduce_bucket_sise": 5e7, "cpu_offload": false}
}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "ds.json") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_every_problem_in_one_run_with_its_place(write, capsys):
    name = write(BAD)
    assert main(["check", name]) == 1
    assert capsys.readouterr().out.splitlines() == [
        (
            f"{name}:2:3: warning: hjson, but not JSON: expecting property name enclosed in double quotes. "
            "The Trainer and Accelerate read JSON only"
        ),
        f"{name}:4:28: error: fp8/margn: unknown key; did you mean 'margin'?",
        f"{name}:5:30: error: msamp/opt_level: 'O4' is not one of O1, O2, O3",
        f"{name}:6:37: error: zero_optimization/reduce_bucket_sise: unknown key; did you mean 'reduce_bucket_size'?",
        f"{name}:6:64: warning: zero_optimization/cpu_offload: deprecated in DeepSpeed; use offload_optimizer instead",
        f"{name}: 3 errors, 2 warnings",
    ]


def test_a_good_file_says_what_it_asks_for(write, capsys):
    name = write('{"train_batch_size": 8, "bf16": {"enabled": true}, "fp8": {"enabled": true, "recipe": "block"}}')
    assert main(["check", name]) == 0
    assert capsys.readouterr().out == f"{name}: ok: fp8 (HYBRID, block; backend auto), ZeRO 0, bf16\n"


def test_a_file_without_our_sections_is_fine_and_named_so(write, capsys):
    assert main(["check", write('{"train_batch_size": 8}')]) == 0
    assert "neither fp8 nor msamp is on" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", '"text"', '{"fp8": [1,2'])
def test_unreadable_is_code_2(write, text, capsys):
    assert main(["check", write(text)]) == 2
    assert "error" in capsys.readouterr().out


def test_missing_file_is_code_2(capsys):
    assert main(["check", "no/such.json"]) == 2
    assert capsys.readouterr().out.startswith("no/such.json: error: no such file")


def test_the_worst_of_several_files_decides(write):
    good = write('{"train_batch_size": 8, "fp8": {"enabled": true}}', "good.json")
    assert main(["check", good, write(BAD)]) == 1
    assert main(["check", good, "missing.json", write(BAD)]) == 2
    assert main(["check", good]) == 0


def test_strict_lets_warnings_count(write):
    name = write('{"train_batch_size": 8, "my_own_key": 1, "fp8": {"enabled": true}}')
    assert main(["check", name]) == 0
    assert main(["check", "--strict", name]) == 1


def test_json_carries_the_same_facts(write, capsys):
    name = write(BAD)
    assert main(["check", "--json", name]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["file"], answer["code"], answer["settings"]) == (name, 1, None)
    assert answer["problems"][1] == {
        "path": "fp8/margn",
        "message": "unknown key; did you mean 'margin'?",
        "line": 4,
        "column": 28,
        "severity": "error",
    }


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["inspect"], 2), (["--help"], 0), (["check"], 2)])
def test_wrong_usage_is_code_2_and_help_is_0(argv, code, capsys):
    try:
        assert main(argv) == code
    except SystemExit as exit_:
        assert exit_.code == code
    assert "check" in "".join(capsys.readouterr())
