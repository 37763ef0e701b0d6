"""The cheap question that every engine asks: does this configuration speak of us?"""

from __future__ import annotations

import pytest

from ds_fp8.engine.sections import sections_of
from ds_fp8.engine.source_file import NO_FILE, source_name


@pytest.mark.parametrize(
    "key", ["fp8", "msamp", "FP8", "fp-8", "fp_8", "ms_amp", "MS-AMP", "msampp", "msam", "msapm", "float8", "f8"]
)
def test_our_names_and_what_was_meant_to_be_one(key):
    """DeepSpeed takes any unknown key in silence, so a misspelt section must reach the validator."""
    assert sections_of({key: {}}) == [key]


@pytest.mark.parametrize(
    "key", ["fp16", "bf16", "amp", "fp6", "zero_optimization", "flops_profiler", "steps_per_print"]
)
def test_names_of_deepspeed_are_not_ours(key):
    """A job without FP8 must not even import the validator."""
    assert sections_of({key: {}}) == []


def test_what_is_no_dict_speaks_of_nobody():
    assert sections_of(None) == [] and sections_of("ds.json") == [] and sections_of({8: {}}) == []


def test_messages_name_the_file_of_the_command_line():
    """`--deepspeed_config ds.json` in both spellings; a dict of the script is called so."""
    assert source_name({}, ["train.py", "--deepspeed_config", "a/ds.json"]) == "a/ds.json"
    assert source_name({}, ["train.py", "--deepspeed=zero2.json"]) == "zero2.json"
    assert source_name({}, ["train.py", "--deepspeed", "--epochs", "3"]) == NO_FILE


def test_messages_name_the_file_that_a_client_was_given(tmp_path, monkeypatch):
    """Trainer: from its arguments. Accelerate: from its variable. Else the one file here that has these sections."""
    monkeypatch.chdir(tmp_path)
    config = {"fp8": {"enabled": True, "margn": 1}, "train_batch_size": 8}

    class Trainer:
        def __init__(self):
            self.args = type("Arguments", (), {"deepspeed": "configs/zero2.json"})()

        def train(self):
            return source_name(config, ["train.py"])

    assert Trainer().train() == "configs/zero2.json"
    (tmp_path / "data.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"fp8": {"enabled": true}}')
    assert source_name(config, ["train.py"]) == NO_FILE
    (tmp_path / "mine.json").write_text('{"fp8": {"enabled": true, "margn": 1}, "train_batch_size": "auto"}')
    assert source_name(config, ["train.py"]) == "mine.json"
    (tmp_path / "copy.json").write_text('{"fp8": {"enabled": true, "margn": 1}}')
    assert source_name(config, ["train.py"]) == NO_FILE, "two files: neither is named"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "copy.json")
    assert source_name(config, ["train.py"]) == "copy.json"
