"""`ds_fp8 explain`: every effective value with its origin, and with a model the plan itself."""

from __future__ import annotations

import json

import pytest

from ds_fp8 import config
from ds_fp8.cli.explain import effective_settings
from ds_fp8.cli.main import main
from ds_fp8.config import contract

JOB = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "fp8": {"enabled": True, "margin": 1, "layers": {"exclude": ["head"]}},
    "msamp": {"enabled": True, "opt_level": "O2", "exp_avg_sq": "e4m3"},
}

MODEL = """
from torch import nn

def build():
    model = nn.Sequential()
    model.add_module("body", nn.Linear(64, 128))
    model.add_module("norm", nn.LayerNorm(128))
    model.add_module("head", nn.Linear(128, 50))
    return model
"""


def rows_of(data):
    return {key: (value, origin) for key, value, origin, _ in effective_settings(config.load(data))}


def test_every_key_of_both_sections_is_reported():
    """Nothing is in force that explain does not show."""
    expected = {f"fp8/{key}" for key in contract.properties("fp8")} - {"fp8/layers", "fp8/telemetry"}
    expected |= {f"fp8/layers/{key}" for key in contract.properties("layers")}
    expected |= {f"fp8/telemetry/{key}" for key in contract.properties("telemetry")}
    expected |= {f"msamp/{key}" for key in contract.properties("msamp")} - {"msamp/telemetry"}
    assert rows_of(JOB).keys() == expected


@pytest.mark.parametrize(
    ("key", "value", "origin"),
    [
        ("fp8/margin", "1", "file"),
        ("fp8/interval", "1", "default"),
        ("fp8/layers/exclude", '["head"]', "file"),
        ("fp8/layers/min_features", "decided by the plan", "default"),
        ("msamp/exp_avg", "int8", "level O2"),
        ("msamp/exp_avg_sq", "e4m3", "file"),
        ("msamp/use_te", "false", "default"),
    ],
)
def test_each_value_has_its_origin(key, value, origin):
    assert rows_of(JOB)[key] == (value, origin)


def test_what_msamp_implies_is_said_to_come_from_it():
    rows = rows_of({"msamp": {"enabled": True, "use_te": True, "master": "fp16"}, "bf16": {"enabled": True}})
    assert rows["fp8/enabled"] == ("true", "msamp")
    assert rows["fp8/backend"] == ("transformer_engine", "msamp")
    assert rows["msamp/rounding"] == ("stochastic", "follows another key")


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text(json.dumps(JOB))
    (tmp_path / "explained_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return "ds.json"


def test_tables(job, capsys):
    assert main(["explain", job]) == 0
    text = capsys.readouterr().out
    assert "amax_history_len" in text
    assert "optimizer steps" in text
    assert "zero_stage" in text


def test_with_a_model_it_prints_the_plan(job, capsys):
    pytest.importorskip("torch")
    assert main(["explain", job, "--model", "explained_model:build", "--world-size", "4"]) == 0
    text = capsys.readouterr().out
    assert "1 of 2 Linear -> Fp8Linear" in text
    assert "56% of the model's matrix FLOPs in FP8" in text and "Matrix products" in text
    assert "head" in text
    assert "per rank" in text


def test_with_a_model_as_json(job, capsys):
    assert main(["explain", job, "--model", "explained_model:build", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {module["fqn"]: module["action"] for module in answer["plan"]["modules"]} == {
        "body": "swap",
        "norm": "swap",
        "head": "keep",
    }
    assert answer["estimate"]["zero_stage"] == 2


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("explained_model", "module:factory"),
        ("nowhere:build", "no module nowhere in "),
        ("./explained_model.py:build", "explained_model:build"),
        ("explained_model:x", "AttributeError"),
    ],
)
def test_a_model_that_cannot_be_built_is_code_2(job, model, words, capsys):
    assert main(["explain", job, "--model", model]) == 2
    assert words in capsys.readouterr().out


def test_options_of_a_plan_need_a_model(job, capsys):
    """Without --model nothing is planned, and a misspelt device would go unnoticed."""
    with pytest.raises(SystemExit) as caught:
        main(["explain", job, "--device", "h10", "--world-size", "8"])
    assert caught.value.code == 2 and "--device, --world-size: " in capsys.readouterr().err


def test_a_plan_that_is_refused_is_code_1(job, capsys):
    """The pattern matches nothing in this model: only the plan can know."""
    from pathlib import Path

    data = {**JOB, "fp8": {"enabled": True, "layers": {"exclude": ["tail"]}}}
    Path(job).write_text(json.dumps(data))
    assert main(["explain", job, "--model", "explained_model:build"]) == 1
    assert "PlanError" in capsys.readouterr().out


def test_a_file_without_our_sections_says_so(tmp_path, capsys):
    (tmp_path / "ds.json").write_text("{}")
    assert main(["explain", str(tmp_path / "ds.json")]) == 0
    assert "training is DeepSpeed's own" in capsys.readouterr().out


def test_a_plan_for_a_machine_that_is_not_here(tmp_path, monkeypatch, capsys):
    """A login node without a GPU plans for an H100; mxfp8 is refused there and planned for a B200."""
    (tmp_path / "planned_elsewhere.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))\n"
    )
    monkeypatch.chdir(tmp_path)
    for recipe in ("delayed", "mxfp8"):
        (tmp_path / f"{recipe}.json").write_text(json.dumps({"fp8": {"enabled": True, "recipe": recipe}}))
    arguments = ["--model", "planned_elsewhere:build"]
    assert main(["explain", "delayed.json", *arguments, "--device", "h100"]) == 0
    assert "NVIDIA H100, compute capability 9.0, assuming that Transformer Engine" in capsys.readouterr().out
    assert main(["explain", "mxfp8.json", *arguments, "--device", "h100"]) == 1
    assert main(["explain", "mxfp8.json", *arguments, "--device", "b200"]) == 0
    capsys.readouterr()
    assert main(["explain", "delayed.json", *arguments, "--device", "tpu9"]) == 1
    assert "none of a100, l40s, h100, h200, b200" in capsys.readouterr().out
