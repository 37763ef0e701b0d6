"""`config.load`: the same sources as DeepSpeed, "auto" everywhere, and what each section becomes."""

from __future__ import annotations

import base64
import json

import pytest

from ds_fp8 import config
from ds_fp8.config import contract
from ds_fp8.errors import ConfigError
from ds_fp8.recipe import HighPrecision

BOTH = {"fp8": {"enabled": True}, "msamp": {"enabled": True, "opt_level": "O2"}, "bf16": {"enabled": True}}

HJSON = """
# comments of all three kinds, quoteless keys, trailing commas: what DeepSpeed reads, we read
{
  // the main thing
  fp8: {"enabled": true, "margin": 2,},   /* until
  here */
  "zero_optimization": {"stage": 3},
  bf16: {enabled: true}
}
"""


def test_file_dict_and_base64_give_the_same_settings(tmp_path):
    """DeepSpeed takes all three, so must we; the name of the source is all that differs."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(BOTH))
    encoded = base64.urlsafe_b64encode(json.dumps(BOTH).encode()).decode()
    from_dict = config.load(BOTH, where="x")
    assert config.load(file, where="x") == from_dict
    assert config.load(str(file), where="x") == from_dict
    assert config.load(encoded, where="x") == from_dict
    assert config.load(file).source == str(file)


def test_base64_longer_than_a_file_name_may_be():
    """The launcher passes whole configurations as one argument; asking the file system for such a name is an
    OSError.
    """
    data = {**BOTH, "padding": "x" * 5000}
    assert config.load(base64.urlsafe_b64encode(json.dumps(data).encode()).decode()).fp8.enabled


def test_hjson_is_read(tmp_path):
    file = tmp_path / "ds.hjson"
    file.write_text(HJSON)
    settings = config.load(file)
    assert settings.fp8.recipe.margin == 2
    assert settings.deepspeed.zero_stage == 3
    assert settings.deepspeed.base_dtype == "bf16"


def test_no_sections_no_settings_no_complaints():
    """An unmodified DeepSpeed job is none of our business, whatever keys its script keeps in the file."""
    settings = config.load({"train_batch_size": 8, "my_own_key": 1, "zero_optimisation": {}})
    assert not settings.enabled
    assert settings.notes == ()


@pytest.mark.parametrize("section", ["fp8", "msamp"])
def test_disabled_is_off(section):
    assert not config.load({section: {"enabled": False}}).enabled


def test_auto_is_accepted_for_every_key_and_means_the_default():
    """As everywhere in DeepSpeed's ecosystem; `enabled` counts as true, for who writes the section wants it."""
    fp8 = dict.fromkeys(contract.properties("fp8"), "auto")
    msamp = dict.fromkeys(contract.properties("msamp"), "auto")
    settings = config.load({"fp8": fp8, "msamp": msamp})
    baseline = config.load({"fp8": {"enabled": True}, "msamp": {"enabled": True}})
    assert settings.fp8 == baseline.fp8
    assert settings.msamp.level == baseline.msamp.level
    assert settings.msamp.explicit == frozenset()


@pytest.mark.parametrize("section", ["layers", "telemetry"])
def test_auto_is_accepted_inside(section):
    inside = dict.fromkeys(contract.properties(section), "auto")
    assert config.load({"fp8": {"enabled": True, section: inside}}).fp8.enabled


def test_numbers_may_be_written_as_5e2():
    """JSON has no integers; people write 5e8."""
    recipe = config.load({"fp8": {"enabled": True, "amax_history_len": 5e2}}).fp8.recipe
    assert recipe.amax_history_len == 500
    assert type(recipe.amax_history_len) is int


def test_every_fp8_key_arrives():
    """One file with every key away from its default; nothing is parsed and dropped."""
    given = {
        "enabled": True,
        "backend": "transformer_engine",
        "recipe": "delayed",
        "fp8_format": "E4M3",
        "margin": 1,
        "interval": 4,
        "amax_history_len": 16,
        "amax_compute_algo": "most_recent",
        "amax_rules": "transformer_engine",
        "override_linear_precision": [False, False, True],
        "reduce_amax": False,
        "layers": {
            "include": ["a.*"],
            "exclude": ["*.head"],
            "linear": True,
            "norm": False,
            "library_norms": True,
            "first_last_high_precision": True,
            "min_features": 256,
        },
        "fuse": False,
        "compile": False,
        "frozen_weights": "fp8",
        "weight_cache": False,
        "eval": True,
        "start_step": 10,
        "first_step_check": "error",
        "zero3_hooks": "deepspeed",
        "max_nonfinite_steps": 0,
        "checkpoint_on_signal": "$CHECKPOINT_DIR",
        "checkpoint_fallback": True,
        "telemetry": {"enabled": True, "interval": 5, "path": "runs"},
    }
    assert given.keys() == contract.properties("fp8").keys(), "a new key of the schema belongs into this test"
    fp8 = config.load({"fp8": given}).fp8
    recipe = fp8.recipe
    assert (recipe.kind, recipe.fp8_format, recipe.margin, recipe.interval) == ("delayed", "E4M3", 1, 4)
    assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.reduce_amax) == (16, "most_recent", False)
    assert recipe.override_linear_precision == HighPrecision(wgrad=True)
    assert recipe.amax_rules == "transformer_engine"
    assert fp8.layers == config.LayerSettings(("a.*",), ("*.head",), True, False, True, True, 256)
    assert (fp8.backend, fp8.fuse, fp8.weight_cache, fp8.eval, fp8.start_step) == (
        "transformer_engine",
        False,
        False,
        True,
        10,
    )
    fused = {"enabled": True, "backend": "transformer_engine", "fuse": True}
    assert config.load({"fp8": fused}).fp8.fuse, "which goes with no product in high precision"
    assert fp8.telemetry == config.TelemetrySettings(True, 5, "runs")
    assert fp8.checkpoint_on_signal == "$CHECKPOINT_DIR" and fp8.frozen_weights == "fp8"
    assert fp8.first_step_check == "error" and fp8.max_nonfinite_steps == 0 and fp8.checkpoint_fallback
    assert fp8.zero3_hooks == "deepspeed" and not fp8.implied
    switched = {"fp8": {"enabled": False, "zero3_hooks": "deepspeed"}, "msamp": {"enabled": True, "opt_level": "O2"}}
    assert config.load(switched).fp8.zero3_hooks == "deepspeed", "msamp alone replaces the hooks too"


def test_every_msamp_key_arrives():
    given = {
        "enabled": True,
        "opt_level": "O3",
        "use_te": True,
        "exp_avg": "e4m3_expanded",
        "exp_avg_sq": "bf16",
        "master": "fp16",
        "rounding": "nearest",
        "gradient_wire": "e5m2",
        "gradient_wire_scope": "inter_node",
        "weight_wire": "e4m3",
        "weight_wire_exclude": ["*.dt_proj"],
        "block_size": 128,
        "checkpoint_on_signal": "ckpt",
        "checkpoint_fallback": True,
        "telemetry": {"enabled": True},
    }
    assert given.keys() == contract.properties("msamp").keys(), "a new key of the schema belongs into this test"
    settings = config.load({"msamp": given, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    level = settings.msamp.level
    assert (level.name, level.exp_avg, level.exp_avg_sq, level.master) == ("O3", "e4m3_expanded", "bf16", "fp16")
    assert (level.rounding, level.gradient_wire, level.gradient_wire_scope) == ("nearest", "e5m2", "inter_node")
    assert (level.weight_wire, level.block_size) == ("e4m3", 128)
    assert settings.msamp.weight_wire_exclude == ("*.dt_proj",)
    assert settings.msamp.explicit == given.keys()
    assert settings.telemetry.enabled
    assert settings.checkpoint_on_signal == "ckpt" and settings.checkpoint_fallback


def test_level_sets_the_defaults_and_a_key_overrides_one():
    level = config.load({**BOTH, "msamp": {"enabled": True, "opt_level": "O2", "exp_avg_sq": "e4m3"}}).msamp.level
    assert (level.exp_avg, level.exp_avg_sq, level.master) == ("int8", "e4m3", "split24")


def test_fp16_master_rounds_stochastically_unless_told_otherwise():
    """With nearest rounding a scaled fp16 master loses most of a small update (docs/numerics.md, 5)."""
    level = config.load({**BOTH, "msamp": {"enabled": True, "opt_level": "O2", "master": "fp16"}}).msamp.level
    assert level.rounding == "stochastic"


def test_msamp_alone_implies_fp8_and_says_so():
    settings = config.load({"msamp": {"enabled": True, "opt_level": "O1"}})
    assert settings.fp8.enabled
    assert settings.fp8.implied
    assert "msamp turns FP8 matrix products on" in settings.notes[0]


def test_fp8_switched_off_beside_msamp_stays_off():
    settings = config.load({"fp8": {"enabled": False}, "msamp": {"enabled": True, "opt_level": "O2"}})
    assert settings.msamp.enabled
    assert not settings.fp8.enabled


@pytest.mark.parametrize("fp8", [{}, {"fp8": {"enabled": True}}, {"fp8": {"enabled": True, "backend": "auto"}}])
def test_use_te_means_backend_transformer_engine(fp8):
    settings = config.load({**fp8, "msamp": {"enabled": True, "use_te": True}})
    assert settings.fp8.backend == "transformer_engine"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}, "fp16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "fp32"),
    ],
)
def test_base_dtype_is_what_deepspeed_casts_to(sections, expected):
    assert config.load(sections).deepspeed.base_dtype == expected


def test_facts_of_deepspeed():
    facts = config.load(
        {
            "gradient_accumulation_steps": 4,
            "optimizer": {"type": "AdamW"},
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}, "cpu_offload_param": True},
            "torch_autocast": {"enabled": True},
        }
    ).deepspeed
    assert (facts.zero_stage, facts.gradient_accumulation_steps, facts.optimizer) == (3, 4, "AdamW")
    assert (facts.offload_optimizer, facts.offload_param, facts.torch_autocast) == ("nvme", "cpu", True)


def test_facts_left_open():
    """ "auto" and absence are the same: somebody above or below decides."""
    facts = config.load(
        {"gradient_accumulation_steps": "auto", "optimizer": {"type": "auto"}, "zero_optimization": {"stage": "auto"}}
    ).deepspeed
    assert (facts.zero_stage, facts.gradient_accumulation_steps, facts.optimizer) == (0, None, None)


def test_old_boolean_form_of_zero_is_stage_1():
    assert config.load({"zero_optimization": True}).deepspeed.zero_stage == 1


def test_a_misspelt_key_that_deepspeed_leaves_unread_is_a_note():
    """DeepSpeed trains with its default there, and says nothing."""
    data = {**BOTH, "optimizer": {"type": "AdamW", "param": {"lr": 1e-4}}}
    assert config.load(data).notes == ("optimizer/param: unknown key; did you mean 'params'?",)
    assert config.load({**BOTH, "optimizer": {"type": "AdamW", "of_my_script": 1}}).notes == ()


def test_deprecated_keys_of_deepspeed_are_named_with_their_replacement():
    notes = config.load({**BOTH, "zero_optimization": {"stage": 2, "cpu_offload": True}}).notes
    assert notes == ("zero_optimization/cpu_offload: deprecated in DeepSpeed; use offload_optimizer instead",)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/file.json", "no such file"),
        ("???", "no such file"),
        (base64.urlsafe_b64encode(b"hello").decode(), "not base64 of a configuration"),
        (3, "int is no configuration"),
        (None, "NoneType is no configuration"),
    ],
)
def test_unreadable_sources_are_refused_with_the_reason(source, words):
    with pytest.raises(ConfigError, match=words):
        config.load(source)


def test_syntax_errors_have_a_place(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{\n  "fp8": {"enabled": true,\n')
    (problem,) = config.check(file)
    assert (problem.line, problem.column, problem.path) == (2, 10, "")
    assert problem.message == "this { is never closed"


def test_duplicate_keys_are_refused_with_their_place(tmp_path):
    """DeepSpeed refuses them too, but without a line and only the first."""
    file = tmp_path / "ds.json"
    file.write_text('{\n "fp8": {"enabled": true,\n  "enabled": false}\n}')
    with pytest.raises(ConfigError, match="fp8/enabled: written twice"):
        config.load(file)
    twice = next(problem for problem in config.check(file) if "twice" in problem.message)
    assert (twice.line, twice.column) == (3, 3)


def test_an_endless_number_of_micro_batches_is_no_traceback():
    """1e400 is infinity to Python; DeepSpeed will say what it thinks of it."""
    settings = config.load({**BOTH, "gradient_accumulation_steps": float("inf")})
    assert settings.deepspeed.gradient_accumulation_steps is None
