"""Cross-field rules: each refusal, and beside it the neighbouring configuration that must pass."""

from __future__ import annotations

import re

import pytest
import torch

from ds_fp8 import config
from ds_fp8.config import conflicts, refusals, rules
from ds_fp8.config.model_refusals import MODEL_REFUSALS
from ds_fp8.config.refusal import Layer, ModelFacts
from ds_fp8.config.resolve import settings_of
from ds_fp8.errors import ConfigError, PlanError
from ds_fp8.plan import make_plan

BF16 = {"bf16": {"enabled": True}}
ZERO2 = {"zero_optimization": {"stage": 2}}


def fp8(**keys):
    return {"fp8": {"enabled": True, **keys}}


def msamp(level="O2", **keys):
    return {"msamp": {"enabled": True, "opt_level": level, **keys}, **BF16, **ZERO2}


def zero(**keys):
    return {"zero_optimization": {"stage": 2, **keys}}


REFUSED = [
    (
        {**msamp(), **zero(stage=3, elastic_checkpoint=True)},
        "zero_optimization/elastic_checkpoint",
        {**msamp(), **zero(stage=2, elastic_checkpoint=True)},
    ),
    (
        {**msamp(), "optimizer": {"type": "AdamW", "params": {"maximize": True, "torch_adam": True}}},
        "optimizer/params/maximize",
        {**msamp(), "optimizer": {"type": "AdamW", "params": {"maximize": False, "torch_adam": True}}},
    ),
    (
        {**msamp(exp_avg_sq="fp16"), "optimizer": {"type": "Lion", "params": {}}},
        "msamp/exp_avg_sq",
        {**msamp(exp_avg="fp16"), "optimizer": {"type": "Lion", "params": {}}},
    ),
    ({**fp8(), "fp16": {"enabled": True}}, "fp16/enabled", {**fp8(), **ZERO2, "fp16": {"enabled": True}}),
    ({**fp8(fuse=True), **zero(stage=3)}, "fp8/fuse", {**fp8(fuse=True), **zero(stage=2)}),
    (fp8(fuse=True, override_linear_precision=[False, True, False]), "fp8/fuse", fp8(fuse=True)),
    (
        {**fp8(frozen_weights="fp8"), **zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/tmp"})},
        "fp8/frozen_weights",
        {**fp8(frozen_weights="fp8"), **zero(stage=3, offload_param={"device": "cpu"})},
    ),
    (fp8(frozen_weights="fp8", recipe="rowwise"), "fp8/frozen_weights", fp8(frozen_weights="fp8", recipe="block")),
    (fp8(recipe="current", margin=1), "fp8/margin", fp8(recipe="current", margin=0)),
    (fp8(recipe="block", amax_history_len=16), "fp8/amax_history_len", fp8(amax_history_len=16)),
    (fp8(recipe="current", amax_compute_algo="most_recent"), "fp8/amax_compute_algo", fp8(recipe="current")),
    (fp8(recipe="mxfp8", backend="torch"), "fp8/recipe", fp8(recipe="mxfp8")),
    (fp8(recipe="rowwise", backend="transformer_engine"), "fp8/recipe", fp8(recipe="rowwise", backend="torch")),
    (fp8(recipe="rowwise", fuse=True), "fp8/fuse", fp8(recipe="rowwise")),
    (fp8(fuse=True, backend="torch"), "fp8/fuse", fp8(fuse=True)),
    (fp8(layers={"linear": False, "norm": False}), "fp8/layers", fp8(layers={"linear": False})),
    ({**msamp(use_te=True), **fp8(backend="torch")}, "msamp/use_te", {**msamp(use_te=True), **fp8()}),
    (
        {**msamp(use_te=False), **fp8(backend="transformer_engine")},
        "msamp/use_te",
        {**msamp(), **fp8(backend="transformer_engine")},
    ),
    ({**msamp(use_te=True), "fp8": {"enabled": False}}, "msamp/use_te", {**msamp(), "fp8": {"enabled": False}}),
    ({**msamp("O3"), "fp8": {"enabled": False}}, "msamp/opt_level", msamp("O3")),
    ({**msamp(weight_wire="e4m3"), "fp8": {"enabled": False}}, "msamp/weight_wire", msamp(weight_wire="e4m3")),
    (
        {**msamp("O3"), "zero_optimization": {"stage": 0}},
        "msamp/opt_level",
        {**msamp("O3"), "zero_optimization": {"stage": 1}},
    ),
    (
        {**msamp("O3"), **fp8(recipe="mxfp8")},
        "fp8/recipe",
        {**msamp("O3"), **fp8(recipe="block", weight_cache=False)},
    ),
    (
        {**msamp("O3"), **fp8(recipe="rowwise")},
        "fp8/recipe",
        {**msamp("O2"), **fp8(recipe="rowwise")},
    ),
    ({**msamp(master="split24"), "bf16": {"enabled": False}}, "msamp/master", {**msamp(), "bf16": {"enabled": False}}),
    (msamp("O1", rounding="stochastic"), "msamp/rounding", msamp("O2", rounding="stochastic")),
    (
        msamp(gradient_wire="none", gradient_wire_scope="inter_node"),
        "msamp/gradient_wire_scope",
        msamp(gradient_wire_scope="inter_node"),
    ),
    (
        {**msamp(telemetry={"enabled": True}), **fp8(telemetry={"enabled": False})},
        "msamp/telemetry",
        {**msamp(telemetry={"enabled": True}), **fp8(telemetry={"enabled": True})},
    ),
    (
        {**msamp(checkpoint_on_signal="a"), **fp8(checkpoint_on_signal="b")},
        "msamp/checkpoint_on_signal",
        {**msamp(checkpoint_on_signal="a"), **fp8(checkpoint_on_signal="a")},
    ),
    (msamp("O2", weight_wire_exclude=["a"]), "msamp/weight_wire_exclude", msamp("O3", weight_wire_exclude=["a"])),
    (fp8(compile=True, backend="transformer_engine"), "fp8/compile", fp8(compile=True, backend="torch")),
    (fp8(compile=True, recipe="mxfp8"), "fp8/compile", fp8(compile=False, recipe="mxfp8")),
    (fp8(compile={}, fuse=True), "fp8/compile", fp8(compile="auto", fuse=True)),
    ({**fp8(compile=True), **zero(stage=3)}, "fp8/compile", {**fp8(compile=True), **zero(stage=2)}),
    (
        {**msamp("O3"), **fp8(compile={"mode": "reduce-overhead"})},
        "fp8/compile/mode",
        {**msamp("O2"), **fp8(compile={"mode": "reduce-overhead"})},
    ),
    (
        fp8(compile={"mode": "max-autotune"}, weight_cache=True),
        "fp8/weight_cache",
        fp8(compile={"mode": "max-autotune-no-cudagraphs"}, weight_cache=True),
    ),
    ({**fp8(), "compile": {"deepcompile": True}}, "compile/deepcompile", {**fp8(), "compile": {"deepcompile": False}}),
    (
        {**msamp(), "tensor_parallel": {"autotp_size": 2}},
        "tensor_parallel/autotp_size",
        {**msamp(), "tensor_parallel": {"autotp_size": 1}},
    ),
    ({**msamp(), **zero(zenflow={})}, "zero_optimization/zenflow", {**fp8(), **zero(zenflow={})}),
    (
        {**msamp(), **zero(offload_optimizer={"device": "cpu", "super_offload": True})},
        "zero_optimization/offload_optimizer/super_offload",
        {**msamp(), **zero(offload_optimizer={"device": "cpu"})},
    ),
    (
        {**msamp(), **zero(offload_optimizer={"device": "nvme"})},
        "zero_optimization/offload_optimizer/device",
        {**fp8(), **zero(offload_optimizer={"device": "nvme"})},
    ),
    (
        {**msamp(), **zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5})},
        "zero_optimization/offload_optimizer/ratio",
        {**msamp(), **zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 1.0})},
    ),
    ({**msamp(), "optimizer": {"type": "OneBitAdam"}}, "optimizer/type", {**msamp(), "optimizer": {"type": "adamw"}}),
    ({**msamp(), "optimizer": {"type": "Lamb"}}, "optimizer/type", {**fp8(), "optimizer": {"type": "Lamb"}}),
    (
        {**msamp(), "optimizer": {"type": "Adam", "params": {"amsgrad": True}}},
        "optimizer/params/amsgrad",
        {**msamp(), "optimizer": {"type": "Adam", "params": {"amsgrad": False}}},
    ),
    (
        {**msamp(), "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16/bf16_master_weights_and_grads",
        {**fp8(), "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    ),
    (
        {**msamp(), "bf16": {"enabled": True, "bf16_optimizer_states": True}},
        "bf16/bf16_optimizer_states",
        {**msamp(), "bf16": {"enabled": True, "bf16_optimizer_states": False}},
    ),
    (
        {**msamp(), "bf16": {}, "fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        "fp16/fp16_master_weights_and_grads",
        {**msamp(), "bf16": {}, "fp16": {"enabled": True, "fp16_master_weights_and_grads": False}},
    ),
    (
        {**msamp(), **zero(zero_quantized_gradients=True)},
        "zero_optimization/zero_quantized_gradients",
        {**msamp(gradient_wire="none"), **zero(zero_quantized_gradients=True)},
    ),
    (
        {**msamp("O3"), **zero(stage=3, zero_quantized_weights=True)},
        "zero_optimization/zero_quantized_weights",
        {**msamp("O2"), **zero(stage=3, zero_quantized_weights=True)},
    ),
    (
        {**msamp("O3"), **zero(stage=3, zero_quantized_nontrainable_weights=True)},
        "zero_optimization/zero_quantized_nontrainable_weights",
        {**msamp("O3", weight_wire="none"), **zero(stage=3, zero_quantized_nontrainable_weights=True)},
    ),
    (
        {**msamp("O3"), **zero(stage=3, zero_hpz_partition_size=8)},
        "zero_optimization/zero_hpz_partition_size",
        {**msamp("O3"), **zero(stage=3, zero_hpz_partition_size=1)},
    ),
    (
        {**fp8(), "fp16": {"enabled": True}},
        "fp16/enabled",
        {**fp8(), "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    ),
]


@pytest.mark.parametrize(
    ("data", "path", "neighbour"), REFUSED, ids=[f"{path}-{i}" for i, (_, path, _) in enumerate(REFUSED)]
)
def test_refused_by_name_and_the_neighbour_passes(data, path, neighbour):
    with pytest.raises(ConfigError) as caught:
        config.load(data)
    assert [problem.path for problem in caught.value.problems] == [path]
    config.load(neighbour)


def test_every_rule_refuses_something():
    """A rule that no example trips is dead, or wrong. What asks the machine or the model is tried below and in
    tests/plan.
    """
    silent = [
        rule.__name__
        for rule in (*rules.RULES, *conflicts.CONFLICTS)
        if not any(list(rule(data)) for data, _, _ in REFUSED)
    ]
    typed = [settings_of(data, "a test") for data, _, _ in REFUSED]
    unknown = {refusals.recipe_needs_a_device, refusals.transformer_engine_runs, *MODEL_REFUSALS}
    silent += [
        rule.__name__
        for rule in refusals.REFUSALS
        if rule not in unknown and not any(list(rule(settings, None, None)) for settings in typed)
    ]
    assert silent == []


LINEAR, KEPT, NORM = Layer("up", "Linear", True), Layer("head", "Linear", True, "tied"), Layer("ln", "LayerNorm", False)


@pytest.mark.parametrize(
    ("data", "model", "said", "neighbour"),
    [
        (fp8(), ModelFacts(False, (KEPT, NORM)), r"all 1 Linear are kept: head \(tied\)", ModelFacts(False, (LINEAR,))),
        (fp8(), ModelFacts(False), "the model has no nn.Linear", ModelFacts(True)),
        (
            fp8(frozen_weights="fp8"),
            ModelFacts(False, (LINEAR,)),
            "no FP8 layer of this model has a frozen weight",
            ModelFacts(False, (LINEAR,), frozen_weights=("up.weight",)),
        ),
        (
            {**msamp("O3", weight_wire_exclude=["x.*"]), **zero(stage=1)},
            ModelFacts(False, (LINEAR,), (), ("up.weight",), ("x.*",), 1),
            "'x.*' matches no parameter",
            ModelFacts(False, (LINEAR,), (), ("up.weight",), (), 1),
        ),
        (
            {**msamp("O3", weight_wire="e4m3"), **zero(stage=1)},
            ModelFacts(False, (LINEAR,), fp8_weights=0),
            "no weight qualifies",
            ModelFacts(False, (LINEAR,), fp8_weights=1),
        ),
        (
            {**fp8(), **msamp("O3"), **zero(stage=3)},
            ModelFacts(False, (LINEAR,), ("up.weight",), fp8_weights=0),
            "are frozen, as LoRA's base is",
            ModelFacts(False, (LINEAR,), ("up.weight",), fp8_weights=1),
        ),
    ],
)
def test_rules_over_the_model_refuse_what_it_cannot_be(data, model, said, neighbour):
    """The same list as for a file; a model that differs in the one fact passes."""
    settings = settings_of(data, "a test")
    (found,) = refusals.refusals(settings, None, model)
    assert re.search(said, found.what) and list(refusals.refusals(settings, None, neighbour)) == []
    assert list(refusals.refusals(settings)) == [], "without a model nothing is asked of it"


def test_o3_takes_a_frozen_base_that_is_kept_in_fp8():
    """LoRA at O3: the cure that the refusal names is one."""
    model = ModelFacts(False, (LINEAR,), ("up.weight",), fp8_weights=0)
    refused, cured = ({**fp8(**keys), **msamp("O3"), **zero(stage=3)} for keys in ({}, {"frozen_weights": "fp8"}))
    (found,) = refusals.refusals(settings_of(refused, "a test"), None, model)
    assert 'fp8/frozen_weights: "fp8"' in found.cure
    assert list(refusals.refusals(settings_of(cured, "a test"), None, model)) == []


def test_the_plan_refuses_what_check_refuses_in_its_words():
    """Settings that no file made meet the same list, before any rank has met another."""
    settings = settings_of({**fp8(fuse=True), **zero(stage=3)}, "a test")
    (found,) = refusals.refusals(settings)
    with pytest.raises(PlanError) as caught:
        make_plan(torch.nn.Sequential(torch.nn.Linear(32, 32)), settings)
    assert found.what in str(caught.value) and "fp8/fuse" in str(caught.value)
    assert any(found.what in problem.message for problem in config.check({**fp8(fuse=True), **zero(stage=3)}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (fp8(override_linear_precision=[True, True, True]), "no linear layer will compute in FP8"),
        ({**msamp(), "communication_data_type": "fp32"}, "replaced by msamp's gradient wire"),
        ({**msamp(), "optimizer": {"type": "Adam", "params": {"torch_adam": True}}}, "msamp brings its own Adam"),
    ],
)
def test_what_loses_its_effect_is_noted(data, words):
    assert any(words in note for note in config.load(data).notes)


def test_disabled_sections_conflict_with_nothing():
    config.load(
        {"fp8": {"enabled": False}, "msamp": {"enabled": False}, "compile": {"deepcompile": True}, **zero(zenflow={})}
    )
