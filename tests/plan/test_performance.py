"""What was measured decides `auto`, and is reported; hosts for other machines, no GPU needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from ds_fp8.capabilities import Host
from ds_fp8.plan import make_plan, performance
from ds_fp8.plan.decisions import ModuleDecision
from tests.layers.small_models import settings

HOPPER = Host("cuda", "NVIDIA H200", (9, 0), None, "not installed")
ROOT = Path(__file__).parents[2]


def linear(fqn: str, rows: int, columns: int) -> ModuleDecision:
    return ModuleDecision(fqn, "Linear", "swap", "Fp8Linear", "", (rows, columns))


def test_every_case_was_measured():
    """Both backends, three recipes, and the same widths and token counts for all, from a report that exists."""
    widths = {tuple(row) for row in performance.SPEED.values()}
    assert widths == {(1024, 2048, 4096, 8192)}
    assert all(len(row) == len(performance.TOKENS) for rows in performance.SPEED.values() for row in rows.values())
    assert {backend for backend, _ in performance.SPEED} == {"torch", "transformer_engine"}
    assert (ROOT / performance.SOURCE).exists()


@pytest.mark.parametrize(
    ("features", "tokens"),
    [(128, None), (2048, None), (4095, None), (4096, 16384), (5120, 16384), (8192, 4096), (16384, 4096)],
)
def test_between_measured_widths_the_narrower_one_counts(features, tokens):
    assert performance.wins_from("torch", "current", features) == tokens


@pytest.mark.parametrize(
    ("host", "recipe", "backend"),
    [
        (HOPPER, "delayed", "torch"),
        (HOPPER, "mxfp8", None),
        (Host("cuda", "L40S", (8, 9), "2.20.2", ""), "delayed", None),
        (Host("cpu"), "delayed", None),
    ],
    ids=["hopper", "recipe of another GPU", "ada", "cpu"],
)
def test_a_backend_is_preferred_only_where_both_were_measured(host, recipe, backend):
    assert performance.faster_backend(host, recipe) == backend


def test_a_mixed_result_prefers_nobody(monkeypatch):
    monkeypatch.setitem(performance.SPEED, ("torch", "block"), {8192: (0.5, 2.0, 2.0)})
    assert performance.faster_backend(HOPPER, "block") is None


@pytest.mark.parametrize(
    ("over_te", "backend"), [((1.1, 1.0), "torch"), ((0.9, 0.8), "transformer_engine"), ((1.1, 0.9), None)]
)
def test_models_have_the_first_word_about_the_backend(monkeypatch, over_te, backend):
    """Under delayed scaling, which they were trained with; layer by layer our own backend is ahead in every case."""
    models = [performance.MODELS[0]._replace(over_te=ratio) for ratio in over_te]
    monkeypatch.setattr(performance, "MODELS", tuple(models))
    assert performance.faster_backend(HOPPER, "delayed") == backend
    assert performance.faster_backend(HOPPER, "current") == "torch"


def test_the_plan_names_layers_narrower_than_every_model_that_gained():
    """A layer's longer side is the width of its model; kept layers are not counted, nor those of a model that
    gained.
    """
    layers = [linear("keys", 512, 2048), *[linear(f"narrow.{n}", 256, 1024) for n in range(5)]]
    kept = ModuleDecision("head", "Linear", "keep", "", "excluded", (512, 512))
    note = performance.slower_note(HOPPER, "torch", "delayed", [*layers, kept])
    assert note is not None
    assert "5 of 6 Linear (narrow.0, narrow.1, narrow.2 and 2 more), narrower than every model" in note
    assert "eager: GPT of 1.18B, O2, width 2048, 1.31x bf16" in note and "fp8/compile takes" in note
    compiled = performance.slower_note(HOPPER, "torch", "delayed", layers, "default")
    assert compiled is not None and "compiled: GPT of 1.18B" in compiled and "fp8/compile takes" not in compiled
    assert performance.slower_note(HOPPER, "torch", "delayed", [layers[0], kept]) is None
    assert performance.slower_note(Host("cuda", "B200", (10, 0)), "torch", "delayed", layers) is None


def test_every_model_names_a_report_that_tells_of_it():
    for model in performance.MODELS:
        assert f"{model.speed:.2f}" in (ROOT / model.source).read_text(), model


def test_the_banner_says_it_on_that_machine_only():
    """And `min_features` decides nothing by itself: narrow layers won inside a model."""
    model = nn.Sequential(nn.Linear(64, 64))
    on_hopper, here = (make_plan(model, settings(), host=host) for host in (HOPPER, Host()))
    assert "ds_fp8: likely slower in FP8 than in bf16" in on_hopper.banner() and len(on_hopper.swaps) == 1
    assert "likely slower" not in here.banner()
