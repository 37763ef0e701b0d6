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


LINES = ("0.18", "0.19")
"""Release lines of DeepSpeed, each with a schema of the whole file."""


@pytest.mark.parametrize("name", ["generate_optimizers", *LINES])
def test_the_generated_file_is_the_installed_deepspeeds(name):
    """A new DeepSpeed, or a key of ours, shows here first: run the generator again."""
    script = [SCHEMAS / "generate_optimizers.py", "--stdout"]
    target = SCHEMAS / "optimizers.json"
    if name in LINES:
        script, target = [SCHEMAS / "generate_bundled.py", "--stdout", name], bundled(name)
    text = subprocess.run([sys.executable, *script], check=True, capture_output=True, text=True).stdout
    assert json.loads(text[text.index("{\n") :]) == json.loads(target.read_text())


def bundled(line):
    return SCHEMAS / f"ds_fp8.deepspeed-{line}.schema.json"


BAD = {"fp8": {"enabled": True, "margn": 1}, "zero_optimization": {"stage": 7}}
"""Two mistakes."""


@pytest.mark.parametrize("line", LINES)
def test_a_bundled_schema_refers_to_nothing_outside(line):
    """Editors and validators get one file; it finds what `check` finds."""
    from jsonschema import Draft7Validator

    schema = json.loads(bundled(line).read_text())
    Draft7Validator.check_schema(schema)
    text = json.dumps(schema)
    assert '"$ref": "deepspeed' not in text and '"x-' not in text, "SchemaStore takes no keywords of one's own"
    assert schema["$id"].startswith("https://")
    assert len(list(Draft7Validator(schema).iter_errors(BAD))) == 2


def test_a_line_has_the_keys_of_its_last_release():
    """0.18.9 knew no `compute_grad_norm` and no `cpu_offload_params`; 0.19.8 knows the one."""
    keys = [
        json.loads(bundled(line).read_text())["definitions"]["deepspeed"]["properties"]["zero_optimization"][
            "properties"
        ]
        for line in LINES
    ]
    assert "compute_grad_norm" not in keys[0] and "compute_grad_norm" in keys[1]
    assert "save_muon_momentum_buffer_in_memory" in keys[0]


def test_the_command_prints_the_file_of_the_installed_deepspeed(capsys, monkeypatch):
    """Of the installed line, of the one that is asked for, else the newest."""
    from importlib import metadata

    from ds_fp8.cli.main import main

    def printed(*arguments):
        assert main(["schema", *arguments]) == 0
        return capsys.readouterr().out.strip()

    monkeypatch.setattr(metadata, "version", {"deepspeed": "0.18.4"}.__getitem__)
    assert printed().endswith("deepspeed-0.18.schema.json")
    assert printed("--deepspeed", "0.19.2").endswith("deepspeed-0.19.schema.json")
    monkeypatch.setattr(metadata, "version", {"deepspeed": "1.2.3"}.__getitem__)
    assert printed().endswith("deepspeed-0.19.schema.json")
    assert json.loads(printed("--print"))["title"] == "DeepSpeed 0.19 configuration with ds_fp8"


@pytest.mark.parametrize("line", LINES)
def test_check_jsonschema_validates_with_it(line, tmp_path):
    """The validator that pre-commit hooks use takes the file as it is, ours and the examples."""
    pytest.importorskip("check_jsonschema")
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(BAD))
    command = [sys.executable, "-m", "check_jsonschema"]
    right = [SCHEMAS.parent / "examples" / "ds_fp8.json", *sorted((SCHEMAS.parent / "configs").glob("*.json"))]
    for arguments, code in (
        (["--check-metaschema", bundled(line)], 0),
        (["--schemafile", bundled(line), *right], 0),
        (["--schemafile", bundled(line), bad], 1),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr


def test_an_optimizer_that_older_releases_have_is_theirs(monkeypatch):
    """DeepSpeed 0.19.7 removed the 1-bit optimizers; a machine with an older one is told nothing."""
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", {"deepspeed": "0.19.8"}.__getitem__)
    assert "was removed in DeepSpeed 0.19.7" in found("optimizer", "OneBitAdam", {"lr": 1e-4})["optimizer/type"]
    monkeypatch.setattr(metadata, "version", {"deepspeed": "0.18.4"}.__getitem__)
    assert found("optimizer", "OneBitAdam", {"lr": 1e-4}) == {}


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "train_batch_size", "gradient_clipping"])
def test_a_quoted_number_that_deepspeed_computes_with_is_an_error(key):
    """Two public files have `"gradient_accumulation_steps": "8"`: DeepSpeed compares text with a number and stops."""
    (problem,) = [one for one in config.check({"train_micro_batch_size_per_gpu": 1, key: "8"}) if one.path == key]
    assert problem.severity == "error" and "write 8 without quotes" in problem.message
