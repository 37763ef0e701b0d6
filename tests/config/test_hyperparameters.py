"""`optimizer/params` and `scheduler/params`: the constructors' names and values, before any rank has started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_fp8 import config

SCHEMAS = Path(__file__).parents[2] / "schemas"


def found(part: str, kind: str, params: object) -> dict[str, str]:
    """path -> message of what `check` says of one section of a file that is right otherwise."""
    problems = config.check({"train_batch_size": 8, part: {"type": kind, "params": params}})
    return {problem.path: problem.message for problem in problems if problem.severity == "error"}


@pytest.mark.parametrize(
    ("part", "kind", "params", "path", "words"),
    [
        ("optimizer", "AdamW", {"weight_deacy": 0.1}, "optimizer/params/weight_deacy", "did you mean 'weight_decay'"),
        ("optimizer", "AdamW", {"beta": 0.9}, "optimizer/params/beta", "did you mean 'betas'"),
        ("optimizer", "AdamW", {"learning_rate": 0.9}, "optimizer/params/learning_rate", "did you mean 'lr'"),
        ("optimizer", "AdamW", {"lr": "1e-4"}, "optimizer/params/lr", "write 1e-4 without quotes"),
        ("optimizer", "AdamW", {"lr": -1}, "optimizer/params/lr", "negative"),
        ("optimizer", "AdamW", {"betas": 0.9}, "optimizer/params/betas", "write [0.9, 0.999]"),
        ("optimizer", "AdamW", {"betas": [0.9, 1.5]}, "optimizer/params/betas", "below 1"),
        ("optimizer", "Adam", {"torch_adam": "true"}, "optimizer/params/torch_adam", "write true without quotes"),
        ("optimizer", "AdamW", {"max_grad_norm": 1.0}, "optimizer/params/max_grad_norm", "gradient_clipping"),
        ("optimizer", "AdamV", {}, "optimizer/type", "did you mean 'AdamW'"),
        ("optimizer", "sgd", {}, "optimizer/type", "did you mean 'SGD'"),
        ("optimizer", "SGD", {"nesterow": True}, "optimizer/params/nesterow", "did you mean 'nesterov'"),
        ("scheduler", "WarmupLR", {"warmup_steps": 10}, "scheduler/params/warmup_steps", "'warmup_num_steps'"),
        ("scheduler", "WarmupLR", {"warmup_num_steps": 0}, "scheduler/params/warmup_num_steps", "at least one"),
        ("scheduler", "WarmupLR", {"warmup_num_steps": 1.5}, "scheduler/params/warmup_num_steps", "whole number"),
        ("scheduler", "WarmupDecayLR", {}, "scheduler/params", "'total_num_steps' is missing"),
        ("scheduler", "WarmupDecay", {}, "scheduler/type", "did you mean 'WarmupDecayLR'"),
        ("scheduler", "LambdaLR", {"lr_lambda": "x"}, "scheduler/params/lr_lambda", "JSON cannot hold"),
    ],
)
def test_each_mistake_is_named_with_its_cure(part, kind, params, path, words):
    assert words in found(part, kind, params)[path]


@pytest.mark.parametrize(
    ("part", "kind", "params"),
    [
        ("optimizer", "adamw", {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0, "torch_adam": True}),
        ("optimizer", "AdamW", {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}),
        ("optimizer", "Adam", {"adam_w_mode": False, "bias_correction": True, "lr": 3}),
        ("optimizer", "Lion", {"lr": 1e-4, "betas": [0.9, 0.99]}),
        ("optimizer", "SGD", {"lr": 0.1, "momentum": 0.9}),
        ("optimizer", "Muon", {"lr": 0.02, "muon_lr": 0.02, "adam_lr": 3e-4, "momentum": 0.95}),
        ("optimizer", "AdamW", "auto"),
        ("scheduler", "WarmupLR", {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}),
        ("scheduler", "WarmupDecayLR", {"total_num_steps": 100, "warmup_num_steps": 10}),
        ("scheduler", "OneCycle", {"cycle_min_lr": [1e-4, 1e-5], "cycle_max_lr": 1e-3, "cycle_second_step_size": None}),
        ("scheduler", "CosineAnnealingLR", {"T_max": 100}),
    ],
)
def test_what_is_right_is_left_alone(part, kind, params):
    assert found(part, kind, params) == {}


@pytest.mark.parametrize("name", ["generate_optimizers", "generate_bundled"])
def test_the_generated_file_is_the_installed_deepspeeds(name):
    """A new DeepSpeed, or a key of ours, shows here first: run the generator again."""
    script = SCHEMAS / f"{name}.py"
    target = {"generate_optimizers": "optimizers.json", "generate_bundled": "ds_fp8.bundled.schema.json"}[name]
    text = subprocess.run([sys.executable, script, "--stdout"], check=True, capture_output=True, text=True).stdout
    assert json.loads(text[text.index("{\n") :]) == json.loads((SCHEMAS / target).read_text())


def test_the_bundled_schema_refers_to_nothing_outside():
    """Editors and validators get one file; it finds what `check` finds."""
    from jsonschema import Draft7Validator

    schema = json.loads((SCHEMAS / "ds_fp8.bundled.schema.json").read_text())
    Draft7Validator.check_schema(schema)
    assert '"$ref": "deepspeed' not in json.dumps(schema)
    bad = {"fp8": {"enabled": True, "margn": 1}, "zero_optimization": {"stage": 7}}
    messages = [error.message for error in Draft7Validator(schema).iter_errors(bad)]
    assert len(messages) == 2
