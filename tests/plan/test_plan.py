"""The plan as data: frozen, printable, through JSON and back, one digest; and what it costs."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
from torch import nn

from ds_fp8.capabilities import Host
from ds_fp8.config.settings import DeepSpeedFacts, Fp8Settings, LayerSettings, MsampSettings, Settings
from ds_fp8.errors import PlanError
from ds_fp8.levels import LEVELS
from ds_fp8.plan import Plan, estimate, flops_share, make_plan
from ds_fp8.recipe import HighPrecision, Recipe
from tests.layers.small_models import TinyModel, settings


def plan_at(
    level: str | None,
    stage: int = 2,
    world_size: int = 2,
    model: nn.Module | None = None,
    base: str = "bf16",
    **fp8,
) -> Plan:
    msamp = MsampSettings(True, LEVELS[level]) if level else MsampSettings()
    facts = DeepSpeedFacts(zero_stage=stage, base_dtype=base)
    job = Settings(Fp8Settings(**({"enabled": True} | fp8)), msamp, facts)
    return make_plan(model or TinyModel(), job, host=Host(), world_size=world_size)


def test_the_plan_is_frozen_and_survives_json():
    plan = plan_at("O3", recipe=Recipe(override_linear_precision=HighPrecision(wgrad=True)))
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).digest() == plan.digest()
    with pytest.raises(FrozenInstanceError):
        plan.world_size = 3


def test_the_digest_follows_decisions_and_not_the_name_of_the_device():
    plan = plan_at("O2")
    assert plan.digest() == plan_at("O2").digest()
    assert plan.digest() == replace(plan, device="H200").digest()
    assert (
        len({plan.digest(), plan_at("O1").digest(), plan_at("O2", world_size=4).digest(), plan_at(None).digest()}) == 4
    )


def test_without_msamp_stations_get_nothing():
    plan = plan_at(None)
    assert plan.optim is None and plan.comm is None
    assert plan_at("O2", enabled=False).modules == ()


def test_banner():
    """Counts, target, numerics and reasons in one line; effective settings; the level."""
    text = plan_at("O3").banner()
    assert text.splitlines() == [
        (
            "ds_fp8: 4 of 5 Linear -> Fp8Linear (HYBRID, delayed, history 1024 (max), margin 0); kept 1: "
            "head (tied to embed (Embedding))"
        ),
        "ds_fp8: 2 of 2 LayerNorm -> Fp8LayerNorm (fp32 inside, high precision out)",
        "ds_fp8: backend torch on cpu (emulated); interval 1; reduce_amax on; weight_cache off; eval off",
        "ds_fp8: 75% of the model's matrix FLOPs in FP8 (assuming sequences of 2048 tokens); not: head 25%",
        (
            "ds_fp8: msamp O3: exp_avg int8, exp_avg_sq fp16, master split24 (nearest rounding, bf16 base); "
            "gradients on the wire e4m3; weights e4m3; ZeRO stage 2, 2 ranks"
        ),
        (
            "ds_fp8: 4 weights only in FP8 between steps: read outside of their layer they have its FP8 values, writes "
            "are refused; model.state_dict() is for all ranks at once; in 16 bits inside "
            "deepspeed.zero.GatheredParameters, or by msamp/weight_wire_exclude; an extension in C++ that is no "
            "operator of torch.ops takes weight.detach()"
        ),
        f"ds_fp8: plan {plan_at('O3').digest()[:12]}",
    ]


def test_the_banner_tells_equal_reasons_once():
    model = nn.Sequential(*[nn.Linear(17, 17) for _ in range(7)], nn.Linear(32, 32))
    text = make_plan(model, settings(), host=Host()).banner()
    assert "1 of 8 Linear" in text and "kept 7: 0, 1, 2, 3 and 3 more (not a multiple of 16: 17, 17)" in text


def test_parameters_name_formats_and_owner():
    plan = plan_at("O3")
    found = {parameter.fqn: parameter for parameter in plan.parameters}
    up, embed = found["blocks.0.up.weight"], found["embed.weight"]
    assert (up.exp_avg, up.exp_avg_sq, up.master, up.gradient_wire) == ("int8", "fp16", "split24", "e4m3")
    assert (up.weight_wire, up.owner) == ("e4m3", "blocks.0.up")
    assert (embed.weight_wire, embed.owner, embed.exp_avg) == ("none", "", "int8")
    assert "head.weight" not in found, "a shared parameter appears once"
    assert plan.comm.fp8_weights == tuple(f"blocks.{n}.{name}.weight" for n in (0, 1) for name in ("up", "down"))


def test_weight_wire_exclude_keeps_weights_in_16_bits():
    """By a parameter's name or its module's; what matches nothing is refused with names that exist."""
    facts = DeepSpeedFacts(zero_stage=2, base_dtype="bf16")

    def plan_without(*patterns: str) -> Plan:
        msamp = MsampSettings(True, LEVELS["O3"], weight_wire_exclude=patterns)
        return make_plan(TinyModel(), Settings(Fp8Settings(True), msamp, facts), host=Host(), world_size=2)

    assert plan_without("*.up").comm.fp8_weights == ("blocks.0.down.weight", "blocks.1.down.weight")
    assert plan_without("blocks.1.*.weight").comm.fp8_weights == ("blocks.0.up.weight", "blocks.0.down.weight")
    with pytest.raises(
        PlanError, match=r"msamp/weight_wire_exclude: 'lm_head' matches no parameter.*\n  Weights .*blocks\.0\.up"
    ):
        plan_without("lm_head")


def test_frozen_parameters_keep_nothing():
    model = TinyModel()
    model.blocks[0].up.requires_grad_(False)
    frozen = next(p for p in plan_at("O3", model=model).parameters if p.fqn == "blocks.0.up.weight")
    assert (frozen.exp_avg, frozen.master, frozen.gradient_wire, frozen.weight_wire) == ("none",) * 4


def test_flops_share():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 96))
    everything = make_plan(model, settings(), host=Host())
    assert flops_share(everything) == 1
    part = make_plan(model, settings(layers=LayerSettings(exclude=("1",))), host=Host())
    assert flops_share(part) == 1 / 4
    two_thirds = make_plan(model, settings(Recipe(override_linear_precision=HighPrecision(wgrad=True))), host=Host())
    assert flops_share(two_thirds) == pytest.approx(2 / 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resident_bytes_of_the_table(world_size):
    """docs/numerics.md: AMP 2 + 14/W, O2 2 + 6.1/W, O3 1 + 8.1/W bytes per parameter under ZeRO-2."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    count = 256 * 256
    options = {"world_size": world_size, "model": model}
    amp = estimate(plan_at(None, **options))
    assert amp.resident_bytes / count == pytest.approx(2 + 14 / world_size)
    assert estimate(plan_at("O2", **options)).resident_bytes / count == pytest.approx(2 + 6.1 / world_size, abs=0.05)
    o3 = estimate(plan_at("O3", **options))
    assert o3.resident_bytes / count == pytest.approx(1 + 8.1 / world_size, abs=0.05)


def test_wire_bytes():
    """ZeRO-2, 4 ranks: DeepSpeed all-reduces bf16 buckets (2 x 2 x 3/4), we send quantized values to their owners (1.03
    x 3/4).
    """
    count = 256 * 256
    options = {"world_size": 4, "model": nn.Sequential(nn.Linear(256, 256, bias=False))}
    baseline, o3 = estimate(plan_at(None, **options)), estimate(plan_at("O3", **options))
    assert baseline.gradient_wire_bytes / count == 3.0
    assert o3.gradient_wire_bytes / count == pytest.approx(0.75 * (1 + 4 / 128))
    assert (baseline.weight_wire_bytes / count, o3.weight_wire_bytes / count) == (1.5, 0.75)
    assert estimate(plan_at("O2", **options), zero_stage=0).weight_wire_bytes == 0


def test_weight_cache_is_counted():
    """Where it is asked for; by default no rank holds quantized whole weights between its forwards."""
    assert estimate(plan_at("O2")).device.cached == 0
    plan = plan_at("O2", weight_cache=True)
    assert estimate(plan).device.cached == 2 * (32 * 48 + 48 * 32)
    assert estimate(plan, zero_stage=3).device.cached == 0
    theirs = replace(plan, fp8=replace(plan.fp8, backend="transformer_engine"))
    assert estimate(theirs).device.cached == 2 * estimate(plan).device.cached, (
        "Transformer Engine keeps transposes beside"
    )
    hopper = replace(plan, fp8=replace(plan.fp8, emulated=False))
    assert estimate(hopper).device.cached == 2 * estimate(plan).device.cached, (
        "so do our layers where a GPU multiplies quantized values"
    )
    high = Recipe(override_linear_precision=HighPrecision(dgrad=True))
    decoded = replace(hopper, fp8=replace(hopper.fp8, recipe=high))
    assert estimate(decoded).device.cached == estimate(plan).device.cached, "the reference path keeps one orientation"


def test_o3_sends_the_weights_of_conv1d_and_experts():
    """Each FP8 layer whose weight is its own alone; experts say that theirs have one scale each."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96))
    assert len(plan_at("O3", model=model).comm.fp8_weights) == 4
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=4, vocab_size=96)
    plan = plan_at("O3", model=transformers.MixtralForCausalLM(config))
    experts = [name for name in plan.comm.fp8_weights if "experts" in name]
    assert experts == [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    assert "Fp8Experts (E4M3, current, one scale per row, and per expert of a weight)" in plan.banner()
    assert plan_at("O2", model=transformers.MixtralForCausalLM(config)).modules != plan.modules
