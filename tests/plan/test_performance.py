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


def test_the_plan_names_layers_that_may_lose():
    """Grouped by the tokens from which they win; kept layers are not counted."""
    layers = [
        linear("wide", 8192, 8192),
        linear("up", 16384, 4096),
        *[linear(f"narrow.{n}", 512, 4096) for n in range(5)],
    ]
    kept = ModuleDecision("head", "Linear", "keep", "", "excluded", (512, 512))
    note = performance.slower_note(HOPPER, "torch", "delayed", [*layers, kept])
    assert note is not None
    assert "1 of 7 below 4096 tokens per micro-batch, 1 of 7 below 16384 tokens" in note
    assert "5 of 7 up to 16384 (narrow.0, narrow.1, narrow.2 and 2 more)" in note
    assert performance.slower_note(HOPPER, "torch", "delayed", [kept]) is None
    assert performance.slower_note(Host("cuda", "B200", (10, 0)), "torch", "delayed", layers) is None


def test_the_banner_says_it_on_that_machine_only():
    """And `min_features` decides nothing by itself: narrow layers won inside a model."""
    model = nn.Sequential(nn.Linear(64, 64))
    on_hopper, here = (make_plan(model, settings(), host=host) for host in (HOPPER, Host()))
    assert "ds_fp8: likely slower in FP8 than in bf16" in on_hopper.banner() and len(on_hopper.swaps) == 1
    assert "likely slower" not in here.banner()
