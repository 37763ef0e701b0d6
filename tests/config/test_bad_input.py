"""Bad input: a clear error with place, value, suggestion and cure; all of a file at once; never an exception of
ours.
"""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_fp8 import config
from ds_fp8.errors import ConfigError


def messages(data: dict) -> dict[str, str]:
    """path -> message of all errors that `load` raises."""
    with pytest.raises(ConfigError) as caught:
        config.load(data)
    return {problem.path: problem.message for problem in caught.value.problems}


def test_all_problems_of_a_file_at_once():
    """The house's example: four mistakes, one error, in the words that the user reads."""
    with pytest.raises(ConfigError) as caught:
        config.load(
            {
                "fp8": {"enabled": True, "margn": 1, "amax_compute_algo": "mean", "amax_history_len": 0},
                "msamp": {"enabled": True, "opt_level": "O4"},
            },
            where="ds.json",
        )
    text = str(caught.value)
    assert text.startswith("ds.json: 4 problems\n")
    assert "  fp8/margn: unknown key; did you mean 'margin'?" in text
    assert "  fp8/amax_compute_algo: 'mean' is not one of max, most_recent" in text
    assert "  fp8/amax_history_len: 0 is less than the minimum of 1" in text
    assert "  msamp/opt_level: 'O4' is not one of O1, O2, O3" in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("enabled", "true", "write true, without quotes"),
        ("enabled", 1, "write true"),
        ("enabled", None, "null"),
        ("fp8_format", "E5M2", "Use HYBRID"),
        ("fp8_format", "hybrid", "did you mean 'HYBRID'?"),
        ("recipe", "delay", "delayed, current, block, rowwise, mxfp8, nvfp4"),
        ("recipe", ["delayed"], "is not one of"),
        ("margin", -1, "less than the minimum of 0 (allowed: 0 to 16 powers of two)"),
        ("margin", "2", "write 2 without quotes"),
        ("margin", True, "is a boolean, expected a whole number"),
        ("margin", 0.5, "expected a whole number"),
        ("interval", 0, "minimum of 1"),
        ("amax_history_len", 1e9, "more than the maximum of 65536"),
        ("override_linear_precision", [True], "[true] has 1 of 3 items: [fprop, dgrad, wgrad]"),
        ("override_linear_precision", {"fprop": True}, "expected a list"),
        ("layers", {"exclud": []}, "did you mean 'exclude'?"),
        ("layers", {"min_features": -3}, "minimum of 0"),
        ("start_step", -1, "minimum of 0"),
        ("telemetry", {"interval": 10}, "'enabled' is missing"),
        ("use_te", True, "it belongs to msamp"),
        ("exclude", ["a"], "it belongs to fp8/layers"),
        ("use_autocast_during_eval", True, "calls it 'eval'"),
        ("zzz", 1, "known are enabled, backend, recipe"),
    ],
)
def test_each_mistake_has_its_cure(key, value, words):
    found = messages({"fp8": {"enabled": True, key: value}})
    assert len(found) == 1
    (path,) = found
    assert path.startswith(f"fp8/{key}")
    assert words in found[path]


def test_int8_is_for_exp_avg_alone():
    """It is the default there, and people will try it for both."""
    data = {"msamp": {"enabled": True, "opt_level": "O2", "exp_avg": "int8", "exp_avg_sq": "int8"}}
    ((path, message),) = messages(data).items()
    assert path.startswith("msamp/exp_avg_sq")
    assert message.startswith("'int8' is not one of fp32, bf16, fp16, e4m3, e4m3_expanded: its steps are evenly spaced")
    assert "Use fp16" in message


@pytest.mark.parametrize("exclude", [[""], [3], ["a", "a"], "lm_head"])
def test_patterns_are_lists_of_distinct_nonempty_texts(exclude):
    """A single text is the likeliest slip: "exclude": "lm_head" would be read as seven letters."""
    assert messages({"fp8": {"enabled": True, "layers": {"exclude": exclude}}})


@pytest.mark.parametrize("section", ["fp8", "msamp"])
@pytest.mark.parametrize("value", [True, None, [], "on", 1])
def test_a_section_is_an_object(section, value):
    assert "expected an object" in messages({section: value})[section]


@pytest.mark.parametrize("section", ["fp8", "msamp"])
def test_a_section_says_whether_it_is_on(section):
    """A section without `enabled` would be off in silence, which is the very thing this package exists against."""
    assert "'enabled' is missing" in messages({section: {}})[section]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *[(name, "fp8") for name in ("fp-8", "FP8", "Fp8", "fp_8", "fp 8", "f8", "pf8", "float8", "fp8_config")],
        *[(name, "msamp") for name in ("ms_amp", "ms-amp", "MS-AMP", "MSAMP", "msapm", "msam", "mssamp", "ms.amp")],
    ],
)
def test_a_misspelt_section_is_always_an_error(name, meant):
    assert f"did you mean '{meant}'?" in messages({name: {"enabled": True}})[name]


@pytest.mark.parametrize(
    "name", ["fp16", "bf16", "amp", "fp6", "fp4", "$schema", "my_fp8_notes", "optimizer", "sampler"]
)
def test_neighbours_of_our_names_are_left_alone(name):
    """DeepSpeed's own keys and a script's own keys look a little like ours and are not ours."""
    assert not config.load({name: {}}).enabled


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("zero_optimzation", "zero_optimization"),
        ("zero-optimization", "zero_optimization"),
        ("optimiser", "optimizer"),
        ("gradient_cliping", "gradient_clipping"),
        ("BF16", "bf16"),
        ("train_batchsize", "train_batch_size"),
    ],
)
def test_a_misspelt_key_of_deepspeed_is_an_error_in_a_job_of_ours(name, meant):
    """DeepSpeed would ignore it in silence, and the plan would rest on the wrong stage or dtype."""
    assert f"did you mean '{meant}'?" in messages({"fp8": {"enabled": True}, name: {}})[name]


def test_an_unknown_key_is_a_note():
    """Scripts keep keys of their own in the file, and DeepSpeed lets them."""
    notes = config.load({"fp8": {"enabled": True}, "my_own_key": 1, "$schema": "x"}).notes
    assert notes == ("my_own_key: unknown key; DeepSpeed and ds_fp8 ignore it",)


def test_quoteless_hjson_string_that_swallowed_a_line(tmp_path):
    file = tmp_path / "ds.hjson"
    file.write_text("{\n  fp8: {\n    recipe: delayed, fp8_format: E4M3\n    enabled: true\n  }\n}\n")
    with pytest.raises(ConfigError, match="without quotes an hjson string runs to the end of the line"):
        config.load(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["enabled", "recipe", "margin", "layers", "telemetry", "opt_level", "master", "use_te", "x"])
sections = st.dictionaries(keys, json_values | st.just("auto") | st.just(True), max_size=6)
tops = st.sampled_from(["fp8", "msamp", "zero_optimization", "bf16", "optimizer", "compile", "ms-amp"])


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("{}[]:,'\"#/*\n \\afp8msamp01true.-eE\t\r\ufeff"), max_size=40))
def test_any_text_is_read_or_refused(text):
    """hjson 3.1.0 itself fails on `/*` with an IndexError; the user must not see that."""
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    try:
        config.load(encoded)
    except ConfigError as error:
        assert error.problems


def test_too_deep_to_read(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text("[" * 100_000)
    (problem,) = config.check(file)
    assert "never closed" in problem.message


def test_a_dict_from_a_script_may_have_any_keys():
    assert messages({"fp8": {"enabled": True, 8: 1}})["fp8/8"] == "is no text, and JSON keys are text"
    config.load({8: 1, "fp8": {"enabled": True}})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(tops, sections | json_values, max_size=5))
def test_nothing_but_a_config_error(data):
    """Whatever stands in the file: settings, or one ConfigError that lists problems. Never a crash of ours."""
    problems = config.check(data)
    assert all(problem.message for problem in problems)
    try:
        config.load(data)
    except ConfigError as error:
        assert error.problems
