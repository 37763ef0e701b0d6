"""`auto` decided, wishes checked against the device: each refusal with its reason, each adaptation reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from ds_fp8.capabilities import Host, host, transformer_engine
from ds_fp8.config.settings import CompileSettings, DeepSpeedFacts, Fp8Settings, MsampSettings, Settings
from ds_fp8.errors import PlanError
from ds_fp8.levels import LEVELS
from ds_fp8.plan import Plan, make_plan
from ds_fp8.recipe import HighPrecision, Recipe

CPU = Host("cpu", "", None, None, "needs a CUDA device")
AMPERE = Host("cuda", "A100", (8, 0), "2.20.2", "")
HOPPER = Host("cuda", "H200", (9, 0), "2.20.2", "")
HOPPER_WITHOUT = Host("cuda", "H200", (9, 0), None, "not installed")
BLACKWELL = Host("cuda", "B200", (10, 0), "2.20.2", "")


def job(
    kind: str = "delayed", level: str | None = None, stage: int = 2, base: str = "bf16", explicit=(), **fp8
) -> Settings:
    msamp = MsampSettings(True, LEVELS[level], explicit=frozenset(explicit)) if level else MsampSettings()
    fp8 = {"enabled": True, "recipe": Recipe(kind=kind), **fp8}
    return Settings(Fp8Settings(**fp8), msamp, DeepSpeedFacts(zero_stage=stage, base_dtype=base))


def plan(settings: Settings, machine: Host = CPU) -> Plan:
    return make_plan(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), settings, host=machine, world_size=2)


@pytest.mark.parametrize(
    "machine, backend, emulated",
    [
        (CPU, "torch", True),
        (AMPERE, "torch", True),
        (HOPPER, "torch", False),  # the faster one in every case measured there (plan/performance.py)
        (BLACKWELL, "transformer_engine", False),  # nothing measured
        (HOPPER_WITHOUT, "torch", False),
    ],
    ids=["cpu", "ampere", "hopper", "blackwell", "hopper without te"],
)
def test_backend_auto(machine, backend, emulated):
    made = plan(job(), machine)
    assert (made.fp8.backend, made.fp8.emulated) == (backend, emulated)


def test_transformer_engine_is_refused_with_the_reason_where_it_does_not_run():
    with pytest.raises(PlanError, match="transformer_engine does not run here: needs a CUDA device"):
        plan(job(backend="transformer_engine"))
    with pytest.raises(PlanError, match=r"compute capability 8\.9 or later, this is A100"):
        plan(job(backend="transformer_engine"), AMPERE)


def test_use_te_of_msamp_falls_back_in_one_visible_line():
    """MS-AMP's examples say use_te; on a laptop they still run, and the banner says what happened."""
    settings = job(level="O2", backend="transformer_engine")
    settings = replace(settings, msamp=replace(settings.msamp, use_te=True))
    made = plan(settings)
    assert made.fp8.backend == "torch" and "use_te: Transformer Engine does not run here" in made.banner()
    assert plan(settings, HOPPER).fp8.backend == "transformer_engine"


@pytest.mark.parametrize(
    ("backend", "found"), [("auto", "torch"), *[(name, name) for name in ("transformer_engine", "torch")]]
)
def test_quantized_values_go_to_either_backend(backend, found):
    """O3 hands te.Linear its weights in quantized form as it does our own layers: the level decides no backend."""
    assert plan(job(level="O3", backend=backend), HOPPER).fp8.backend == found


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_blackwell_recipes(kind):
    assert plan(job(kind), BLACKWELL).fp8.recipe.kind == kind
    with pytest.raises(
        PlanError, match=rf"{kind} needs a GPU of compute capability 10\.0 \(Blackwell\), but this is H200"
    ):
        plan(job(kind), HOPPER)
    with pytest.raises(
        PlanError, match=f"{kind} runs in Transformer Engine only, which does not run here: needs a CUDA"
    ):
        plan(job(kind), CPU)
    with pytest.raises(PlanError, match="exists in Transformer Engine only"):
        plan(job(kind, backend="torch"), BLACKWELL)


def test_rowwise_is_our_own():
    """Transformer Engine has no such recipe; its data cannot be made by the owner of a weight; Ada does not multiply
    rows.
    """
    assert plan(job("rowwise"), HOPPER).fp8.backend == "torch"
    assert plan(job("rowwise"), CPU).fp8.emulated and not plan(job("rowwise"), HOPPER).fp8.emulated
    assert plan(job("rowwise", level="O2"), HOPPER).fp8.recipe.kind == "rowwise"
    with pytest.raises(PlanError, match=r"Transformer Engine has no recipe 'rowwise'.*\n  Set fp8/backend to torch"):
        plan(job("rowwise", backend="transformer_engine"), HOPPER)
    with pytest.raises(PlanError, match="but fp8/recipe is rowwise: dgrad reads a weight"):
        plan(job("rowwise", level="O3"))


def test_fuse_needs_transformer_engine():
    with pytest.raises(PlanError, match="fp8/fuse"):
        plan(job(fuse=True))
    assert plan(job(fuse=True), HOPPER).fp8.fuse


def test_fp16_at_stage_0_is_refused_with_the_upstream_reason():
    with pytest.raises(PlanError, match=r"since 0\.18\.4.*unscales the gradients"):
        plan(job(stage=0, base="fp16"))
    plan(job(stage=1, base="fp16"))
    plan(job(stage=0, base="fp16", level="O2"))  # there the optimizer wrapper is ours


def test_a_default_is_adapted_and_reported_an_explicit_value_is_refused():
    made = plan(job(level="O2", base="fp32"))
    assert made.optim.level.master == "fp32" and "split24 does not apply" in made.banner()
    with pytest.raises(
        PlanError, match="msamp/master: master split24 completes a 16-bit weight, but the parameters are fp32"
    ):
        plan(job(level="O2", base="fp32", explicit=("master",)))


def test_o3_needs_zero_fp8_and_a_recipe_with_quantized_values():
    with pytest.raises(
        PlanError, match=r"opt_level O3 needs FP8 weights in ZeRO, but zero_optimization/stage is 0\.\n  Set"
    ):
        plan(job(level="O3", stage=0))
    with pytest.raises(PlanError, match="but fp8 is off"):
        plan(job(level="O3", enabled=False))
    with pytest.raises(PlanError, match="but fp8/recipe is mxfp8"):
        plan(job("mxfp8", level="O3"), BLACKWELL)
    high = Recipe(override_linear_precision=HighPrecision(dgrad=True))
    with pytest.raises(PlanError, match="no weight qualifies"):
        plan(job(level="O3", recipe=high))
    for cache in (None, False, True):
        assert plan(job(level="O3", weight_cache=cache)).comm.fp8_weights == ("0.weight",)


def test_this_machine():
    """Facts, not wishes: a CPU has no compute capability, and Transformer Engine says why it is absent."""
    found = host("cpu")
    assert found.device_type == "cpu" and found.compute_capability is None and not found.multiplies_fp8
    version, reason = transformer_engine()
    assert (version is None) == bool(reason)


def test_transformer_engine_is_asked_only_where_it_can_come_to_use(monkeypatch):
    """To ask is to import it: seconds, memory, libraries of its own in the process."""
    from ds_fp8 import capabilities

    asked = []
    monkeypatch.setattr(capabilities, "transformer_engine", lambda: asked.append(1) or ("2.20.2", ""))
    here = replace(HOPPER_WITHOUT, transformer_engine=capabilities.UNASKED, transformer_engine_reason="")
    jobs = (job(backend="torch"), job(), job("rowwise"), job(compile=CompileSettings()))
    for settings in jobs:
        assert plan(settings, here).fp8.backend == "torch" and not asked
    assert plan(job(), replace(here, compute_capability=(10, 0))).fp8.backend == "transformer_engine"
    assert asked
