"""The schema of DeepSpeed's own configuration is generated; here it is held against the installed DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from ds_fp8 import config
from ds_fp8.config import contract

SCRIPT = Path(__file__).resolve().parents[2] / "schemas" / "generate_deepspeed.py"


@pytest.fixture(scope="module")
def generator():
    """The script as a module; it needs DeepSpeed of the version that the schema was made from."""
    deepspeed = pytest.importorskip("deepspeed")
    made_from = contract.schema("deepspeed")["x-deepspeed-version"]
    if deepspeed.__version__ != made_from:
        pytest.skip(f"schema made from DeepSpeed {made_from}, installed is {deepspeed.__version__}")
    spec = importlib.util.spec_from_file_location("generate_deepspeed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_script_writes(generator):
    """Nobody edits generated files by hand."""
    assert generator.render(generator.build()) == generator.TARGET.read_text(encoding="utf-8")


def test_no_key_that_deepspeed_asks_for_is_missing(generator):
    """DeepSpeed parses a dict that notes every question; the schema must know each of them."""
    asked = generator.keys_deepspeed_asks_for()
    assert len(asked) > 50
    assert asked - set(contract.schema("deepspeed")["properties"]) == set()


def test_removed_keys_are_deepspeeds(generator):
    from deepspeed.runtime import config as theirs

    assert set(generator.REMOVED) == set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(generator.REMOVED_ZERO) == set(theirs._REMOVED_ZERO_CONFIG_KEYS)


def test_generating_leaves_the_models_as_they_were(generator):
    """The models are looked at, not changed: a deprecated key still moves its value afterwards."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    generator.build()
    assert DeepSpeedZeroConfig(stage=2, cpu_offload=True).offload_optimizer.device == "cpu"


SAMPLES = [
    {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e9, "offload_param": {"device": "cpu"}}},
    {"zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": None}},
    {"zero_optimization": {"stage": 4}},
    {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}},
    {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
    {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "disk"}}},
    {"zero_optimization": {"stage": 1, "offload_optimizer": {"ratio": 2.0}}},
    {"zero_optimization": {"stage": 2, "mics_shard_size": 8}},
    {"fp16": {"enabled": True, "loss_scale": 0, "hysteresis": 2, "min_loss_scale": 1}},
    {"fp16": {"enabled": True, "loss_scal": 0}},
    {"bf16": {"enabled": "nonsense"}},
    {"bf16": {"enabled": True, "bf16_optimizer_states": False}},
    {"compile": {"deepcompile": False, "passes": ["z1"]}},
    {"compile": {"passes": ["z9"]}},
    {"comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}},
    {"csv_monitor": {"enabled": True, "output_path": "x", "job_name": "y"}},
    {"csv_monitor": {"enable": True}},
    {"wandb": {"enabled": True, "team": None}},
    {"hybrid_engine": {"max_out_tokens": 0}},
    {"tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 2}}},
    {"sparse_attention": {}},
    {"communication_data_type": "fp32"},
    {"communication_data_type": "fp8"},
    {"gradient_allreduce_op": "max"},
    {"my_own_key": [1, 2, 3]},
]


@pytest.mark.parametrize("sample", SAMPLES, ids=json.dumps)
def test_check_and_deepspeed_agree(generator, sample):
    """What DeepSpeed refuses is an error of `check`, what it takes is none."""
    from deepspeed.runtime.config import DeepSpeedConfig

    data = {"train_batch_size": 8, **sample}
    try:
        DeepSpeedConfig(json.loads(json.dumps(data)))
        refused = False
    except Exception:  # noqa: BLE001  # pydantic's, DeepSpeed's or an assertion
        refused = True
    errors = [problem for problem in config.check(data) if problem.severity == "error"]
    assert bool(errors) == refused, errors


def test_converted_and_ignored_values_are_warnings():
    """DeepSpeed converts "true" and ignores unknown keys of the sections that it reads key by key."""
    problems = config.check(
        {
            "train_batch_size": 8,
            "bf16": {"enabled": "true"},
            "zero_optimization": {"stage": 2, "cpu_offload": False},
            "activation_checkpointing": {"partition_activation": True},
        }
    )
    assert {problem.path: problem.severity for problem in problems} == {
        "bf16/enabled": "warning",
        "zero_optimization/cpu_offload": "warning",
        "activation_checkpointing/partition_activation": "warning",
    }
    assert any("did you mean 'partition_activations'?" in problem.message for problem in problems)


def test_a_file_without_our_sections_is_checked_too():
    """Who asks is told about DeepSpeed's keys as well, without a section of ours."""
    found = {problem.path: problem for problem in config.check({"zero_optimisation": {"stage": 2}})}
    assert found["zero_optimisation"].severity == "error"
    assert "train_batch_size" in found


def test_batch_sizes_must_fit():
    """DeepSpeed asserts this after the processes have started; a file decides part of it."""
    data = {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    (problem,) = config.check(data)
    assert "10 is not a multiple of 4 x 1" in problem.message


def test_editors_can_use_the_schemas():
    """Draft 7, which every editor knows; the one file refers to the other beside it."""
    from jsonschema import Draft7Validator

    ours, theirs = contract.schema("ds_fp8"), contract.schema("deepspeed")
    for schema in (ours, theirs):
        Draft7Validator.check_schema(schema)
        assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert ours["allOf"] == [{"$ref": theirs["$id"]}]
    assert (contract.folder() / ours["allOf"][0]["$ref"]).is_file()


def test_a_file_full_of_auto_as_trainers_write_it():
    """The template of the Hugging Face documentation in shape: "auto" wherever the trainer knows better."""
    data = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": float("inf"),
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
        "fp8": {"enabled": True},
        "msamp": {"enabled": True, "opt_level": "O2"},
    }
    assert config.check(data) == []


@pytest.mark.parametrize("wrong", [{"fp8": {"enabled": True, "margn": 1}}, {"bf16": {"enabld": True}}, {"fp8": {}}])
def test_the_two_schemas_work_together_as_an_editor_resolves_them(wrong):
    """By the `$ref` from one file to the other, without any help of ours."""
    from jsonschema import Draft7Validator
    from referencing import Registry, Resource

    files = [contract.schema("ds_fp8"), contract.schema("deepspeed")]
    registry = Registry().with_resources((file["$id"], Resource.from_contents(file)) for file in files)
    validator = Draft7Validator(files[0], registry=registry)
    assert validator.is_valid({"fp8": {"enabled": True}, "bf16": {"enabled": True}, "my_own_key": 1})
    assert not validator.is_valid(wrong)
