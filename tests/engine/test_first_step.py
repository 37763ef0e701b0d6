"""What the layers really did in the first step; and jobs whose loss is no number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ranks import run_ranks
from torch import nn

from ds_fp8.engine.first_step import GRADIENT, verdict
from ds_fp8.engine.training_mode import TrainingMode
from ds_fp8.layers import ModelFp8State
from ds_fp8.layers.ran import Ran
from ds_fp8.plan import Plan
from ds_fp8.telemetry import read_jsonl_log
from tests.engine.engine_jobs import config
from tests.engine.first_step_jobs import several


def fp8(stage=1, gas=1, level=None, dtype="bf16", **keys):
    msamp = {"msamp": {"enabled": True, "opt_level": level}} if level else {}
    return config(stage, dtype, gas, fp8={"enabled": True, **keys}, **msamp)


JOBS = {
    "all": [
        (fp8(0), "whole"),
        (fp8(3, level="O3"), "whole"),
        (fp8(2, override_linear_precision=[False, True, True]), "whole"),
        (fp8(1), "recomputedtorch"),
        (fp8(1, recipe="block"), "recomputeddeepspeed"),
        (fp8(0, recipe="current"), "one_rank"),
    ],
    "past": [(fp8(2, gas=2), "past"), (fp8(3), "past"), (fp8(2, level="O3"), "past")],
}
IN_EVAL = [(fp8(1), "pretrained"), (fp8(3, level="O3"), "pretrained"), (fp8(0, eval=False), "pretrained")]
OTHERS = [
    *IN_EVAL,
    (fp8(0, start_step=1), "whole"),
    (fp8(1), "eval"),
    (fp8(2), "unused"),
    (fp8(1, first_step_check="error"), "past"),
    (fp8(1, first_step_check="off"), "past"),
]


@pytest.mark.dist
def test_the_first_step_tells_which_layers_ran(tmp_path):
    """All layers, under accumulation, checkpointing, overridden products, every stage, O3, and on one rank only.

    A fused loss reads a weight past its layer; a layer is never called; in eval mode only; its output is in no loss.
    After the step no mark and no hook is left, and nothing is said a second time. Telemetry sees every operand of a
    training in eval mode too.
    """
    calls = [("first_steps", job) for job in (*JOBS["all"], *JOBS["past"], *OTHERS)]
    watched = fp8(1, telemetry={"enabled": True, "interval": 2, "path": str(tmp_path)})
    more = [(watched, "pretrained"), (fp8(1), "eval_recomputeddeepspeed"), (fp8(1), "eval_recomputed")]
    results = list(zip(*run_ranks(2, several, [*calls, *(("first_steps", job) for job in more)])))
    _, recomputed, kept = (results.pop(len(calls)) for _ in more)
    assert recomputed[0]["losses"] == kept[0]["losses"], "a forward without gradients, under reentrant checkpointing"
    (step,) = [event for event in read_jsonl_log(tmp_path / "telemetry_rank0.jsonl") if event["event"] == "step"]
    assert {found["role"] for found in step["readings"]} == {"input", "weight", "grad_output"}
    for (settings, kind), (shown, silent) in zip((job for _, job in calls), results):
        assert shown["left"] == silent["left"] == [] and shown["hooks"] == silent["hooks"] == 0, (settings, kind)
        assert all(not lines for lines in silent["lines"]), "only rank 0 speaks"
    for shown, _ in results[: len(JOBS["all"])]:
        first, second = shown["lines"]
        assert len(first) == 1 and "planned layers ran in FP8" in first[0] and "all " in first[0] and not second
    for shown, _ in results[len(JOBS["all"]) : -len(OTHERS)]:
        assert "FP8 in 69% of the model's FLOPs, 4 of 6 planned layers ran in FP8 in step 1" in shown["lines"][0][0]
        assert "spare (never called)" in shown["lines"][0][0]
        assert "out (never called, and yet its weight got a gradient" in shown["lines"][0][0]
    *pretrained, (kept, _) = results[-len(OTHERS) : -len(OTHERS) + len(IN_EVAL)]
    for shown, _ in pretrained:
        assert "a step was taken in eval mode" in shown["lines"][0][0] and len(shown["lines"][0]) == 1
        assert "all 6 planned layers ran in FP8 in step 2" in shown["lines"][1][0]
    assert "called in high precision only: in eval mode" in kept["lines"][0][0] and not kept["lines"][1]
    (later, _), (frozen, _), (unused, _), (stopped, too), (silent, _) = results[-len(OTHERS) + len(IN_EVAL) :]
    assert not later["lines"][0] and "all 6 planned layers ran in FP8 in step 2" in later["lines"][1][0]
    assert "frozen.up, frozen.down (called in high precision only" in frozen["lines"][0][0]
    assert "spare (no dgrad and no wgrad" in unused["lines"][0][0]
    assert stopped["error"] == too["error"] and "first_step_check to warn" in too["error"]
    assert silent["lines"] == [[], []]


@pytest.mark.parametrize("asked", [None, False])
def test_a_resumed_run_in_eval_mode_follows_its_own_json(asked):
    """`fp8/eval` false holds from the first forward after a load; hooks on the model go with the mode."""
    model, fp8_state, mode = nn.Linear(2, 2), ModelFp8State(("a",), _plan().fp8, managed=True), TrainingMode()
    fp8_state.follow_mode(True)  # as loading the FP8 state of a run in eval mode does
    settings = SimpleNamespace(fp8=SimpleNamespace(eval=asked))
    mode.resume(SimpleNamespace(model=model, fp8_state=fp8_state, settings=settings))
    assert fp8_state.trains_in_eval is bool(model._forward_pre_hooks) is (asked is None)
    mode.stop()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_what_one_rank_did_counts_for_all():
    """Bits of all ranks are put together by name: the forward of one, the backward of the same."""
    ran = Ran()
    assert "never called" in verdict({"a": ran.bits()}, 1, _plan())[0]
    assert "its weight got a gradient" in verdict({"a": ran.bits() | GRADIENT}, 1, _plan())[0]
    high = _plan().fp8.recipe.override_linear_precision
    ran.forward(high, dgrad=False, wgrad=True)
    assert "a (no wgrad" in verdict({"a": ran.bits()}, 1, _plan())[0]
    ran.backward(high, dgrad=False, wgrad=True)
    assert verdict({"a": ran.bits()}, 7, _plan()) == ("all 1 planned layers ran in FP8 in step 7", True)


def test_experts_with_few_rows_are_no_failure():
    """They ran in bf16 because that is faster: said, and not counted as FP8."""
    few, whole = Ran(), Ran()
    few.called = few.small = True
    whole.forward(_plan().fp8.recipe.override_linear_precision, dgrad=False, wgrad=False)
    text, is_good = verdict({"a": whole.bits(), "experts": few.bits()}, 1, _plan())
    assert is_good and text == (
        "1 module of experts in bf16, as faster at their number of rows, the other 1 planned layers ran in FP8 in "
        "step 1"
    )
    few.forward(_plan().fp8.recipe.override_linear_precision, dgrad=False, wgrad=False)
    assert "all 2 planned layers" in verdict({"a": whole.bits(), "experts": few.bits()}, 1, _plan())[0]


def _plan() -> Plan:
    from torch import nn

    from ds_fp8.config.settings import Fp8Settings, Settings
    from ds_fp8.plan import make_plan

    return make_plan(nn.Sequential(nn.LayerNorm(8)), Settings(fp8=Fp8Settings(enabled=True, implied=True)))


FOREVER = list(range(3, 20))
NO_CHECK = {"bf16": {"enabled": True, "check_grad_overflow": False}}


@pytest.mark.dist
def test_a_loss_that_is_no_number_stops_the_job():
    """Five steps in a row that DeepSpeed takes, though one rank alone met the NaN: all ranks stop at the same step.

    In bf16 DeepSpeed skips them by default: reported, not stopped. One bad step that is skipped is forgotten. 0 never
    stops.
    """
    calls = [
        ("exploding", (fp8(0, dtype="fp32"), FOREVER, [1], 10)),
        ("exploding", ({**fp8(1), **NO_CHECK}, FOREVER, [0], 10)),
        ("exploding", ({**fp8(2, level="O2"), **NO_CHECK}, FOREVER, [0], 10)),
        ("exploding", (fp8(0, dtype="fp32", max_nonfinite_steps=2), [2], [0], 10)),
        ("exploding", (fp8(2), FOREVER, [0], 10)),
        ("exploding", (fp8(2, dtype="fp16"), [2, 3], [0], 10)),
        ("exploding", ({**fp8(2, max_nonfinite_steps=0), **NO_CHECK}, FOREVER, [0], 10)),
    ]
    *stopped, skipped, scaled, never = zip(*run_ranks(2, several, calls))
    for (first, second), taken in zip(stopped, (6, 6, 6, 2)):
        assert first["taken"] == second["taken"] == taken, (first, second)
        for found in (first, second):
            assert "not finite" in found["error"] and "layer.weight" in found["error"]
            assert "max_nonfinite_steps" in found["error"]
    for found in (*skipped, *scaled, *never):
        assert found["taken"] == 10 and not found["error"]
    assert all(found["skipped"] == 8 for found in skipped) and all(found["skipped"] == 2 for found in scaled)
    assert skipped[0]["said"].count("DeepSpeed has skipped 5 steps in a row") == 1
