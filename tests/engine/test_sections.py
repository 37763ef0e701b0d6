"""The cheap question that every engine asks: does this configuration speak of us?"""

from __future__ import annotations

import pytest

from ds_fp8.engine.sections import sections_of, source_name


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
    """`--deepspeed_config ds.json` in both spellings; without it the name is neutral."""
    assert source_name(["train.py", "--deepspeed_config", "a/ds.json"]) == "a/ds.json"
    assert source_name(["train.py", "--deepspeed=zero2.json"]) == "zero2.json"
    assert source_name(["train.py", "--deepspeed", "--epochs", "3"]) == "ds_config"
