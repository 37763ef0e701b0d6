"""What is kept for what it is for: heads, routers, adapters; each by its name converts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_fp8.capabilities import Host
from ds_fp8.config.settings import Fp8Settings, LayerSettings, Settings
from ds_fp8.errors import PlanError
from ds_fp8.plan import make_plan
from ds_fp8.plan.decisions import plan_from_json
from ds_fp8.plan.expert_speed import high_precision, least_rows
from ds_fp8.plan.roles import find_roles
from ds_fp8.recipe import Recipe
from tests.layers.small_models import Block, TinyModel, settings

H100 = Host("cuda", "H100", (9, 0), "2.20.2", "")


class Mixture(nn.Module):
    """Experts as a list of blocks, a gate with one number for each, a shared block beside them."""

    def __init__(self, experts: int = 16):
        super().__init__()
        self.gate = nn.Linear(32, experts, bias=False)
        self.experts = nn.ModuleList(Block() for _ in range(experts))
        self.shared = nn.Linear(32, 32)


class Stacked(nn.Module):
    """Experts as parameters [experts, out, in]."""

    def __init__(self, experts: int = 32):
        super().__init__()
        self.switch = nn.Linear(32, experts)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(experts, 48, 32))


class NoisyTopKGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 64)


class Branches(nn.Module):
    """Experts that are not called so."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 16)
        self.branches = nn.ModuleList(nn.Linear(32, 32) for _ in range(16))


class Gated(nn.Module):
    """A SwiGLU whose projection is called `gate`: no router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(64, 32)
        self.wpe = nn.Embedding(128, 32)
        self.blocks = nn.ModuleList([Mixture(), Stacked(), NoisyTopKGate(), Gated(), Branches()])
        self.to_positions = nn.Linear(32, 128)
        self.output = nn.Linear(32, 64)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 16)})
        self.classifier = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))


def kept(model: nn.Module, host: Host | None = None, **layers) -> set[str]:
    plan = make_plan(model, settings(layers=LayerSettings(**layers)), host=host or Host())
    return {decision.fqn for decision in plan.modules if decision.kind == "Linear" and not decision.is_swap}


ROLES = {
    "blocks.0.gate": "router",
    "blocks.1.switch": "router",
    "blocks.2.project": "router",
    "blocks.4.gate": "router",
    "output": "output head",
    "lora_A.default": "adapter",
    "classifier.0": "classification head",
    "classifier.1": "classification head",
}


def test_roles_are_found_by_structure_and_name():
    """A SwiGLU's `gate`, layers of experts, and a linear as wide as the longest sequence have none."""
    assert {fqn: role.name for fqn, role in find_roles(Zoo()).items()} == ROLES


@pytest.mark.parametrize("host", [Host(), H100], ids=["torch", "transformer_engine"])
def test_they_are_kept_by_default_and_the_reason_names_the_cure(host):
    plan = make_plan(Zoo(), settings(backend="transformer_engine" if host is H100 else "auto"), host=host)
    reasons = {decision.fqn: decision.reason for decision in plan.modules if not decision.is_swap}
    assert set(reasons) == set(ROLES)
    assert (
        reasons["blocks.0.gate"]
        == 'router, in high precision by default; fp8/layers/include ["*", "*.gate"] converts it'
    )
    assert 'output (output head, in high precision by default; fp8/layers/include ["*", "output"]' in plan.banner()


@pytest.mark.parametrize(
    ("pattern", "converted"),
    [
        ("*.gate", {"blocks.0.gate", "blocks.4.gate"}),
        ("*.0.gate*", {"blocks.0.gate"}),
        ("*lora*", {"lora_A.default"}),
        ("out*", {"output"}),
        ("classifier.*", {"classifier.0", "classifier.1"}),
        ("blocks.*", set()),
        ("*", set()),
        ("Linear", set()),
    ],
)
def test_a_pattern_that_names_one_converts_it_and_one_that_sweeps_it_in_does_not(pattern, converted):
    assert set(ROLES) - kept(Zoo(), include=("*", pattern)) == converted


def test_every_pattern_that_a_reason_gives_works():
    """The sentence in the banner is a promise: with its patterns nothing is kept any more."""
    globs = {role.glob for role in find_roles(Zoo()).values()}
    assert not kept(Zoo(), include=("*", *globs))


def test_the_head_of_a_small_model_and_of_a_pipeline_stage():
    """As wide as the embedding; the MLP of as many features is in a block, so it is none."""
    assert kept(TinyModel(words=48, tied=False)) == {"head"}
    stage = nn.Sequential(Block(), nn.LayerNorm(32))
    stage.add_module("lm_head", nn.Linear(32, 64))
    assert kept(stage) == {"lm_head"}, "by its name alone"
    with pytest.raises(PlanError, match=r"all 1 Linear are kept: 0 \(output head"):
        kept(nn.Sequential(nn.Linear(32, 64), nn.Embedding(64, 32)))


FAMILIES = {
    "Llama": {"lm_head": "output head"},
    "Qwen3": {"lm_head": "output head"},
    "BertForSequenceClassification": {"classifier": "classification head"},
    "BertForMaskedLM": {"cls.predictions.decoder": "output head"},
    "T5ForConditionalGeneration": {"lm_head": "output head"},
    "ViTForImageClassification": {"classifier": "classification head"},
    "GPT2LMHeadModel": {"lm_head": "output head"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_families(family):
    """By `get_output_embeddings`, whatever the module is called."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, family if "For" in family or "Head" in family else f"{family}ForCausalLM")
    with torch.device("meta"):
        model = cls(cls.config_class(num_labels=16))
    assert {fqn: role.name for fqn, role in find_roles(model).items()} == FAMILIES[family]


def test_lora_of_peft_and_its_saved_head():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    lora = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    names = {fqn: role.name for fqn, role in find_roles(model).items()}
    assert sorted(names.values()) == ["adapter"] * 4 + ["output head"] * 2
    assert len(kept(model)) == 6
    assert len(kept(model, include=("*", "*lora_*"))) == 2
    assert len(kept(model, include=("*", "*lm_head*"))) == 4


def test_experts_on_a_gpu_are_in_fp8_where_that_was_measured_faster():
    """Wide ones in fprop and dgrad from so many rows on; narrow ones not at all, unless named: in bf16 their rows are
    worth it all the same. On a CPU, emulated, all.
    """
    transformers = pytest.importorskip("transformers")
    gpu = Host("cuda", "NVIDIA H100", (9, 0))

    def planned(host, inner, recipe="current", dtype=torch.float32, **layers):
        config = transformers.MixtralConfig(
            hidden_size=4096, intermediate_size=inner, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=2,
            vocab_size=96,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.MixtralForCausalLM(config).to(dtype)
        fp8 = Fp8Settings(True, recipe=Recipe(kind=recipe), backend="torch", layers=LayerSettings(**layers))
        plan = make_plan(model, Settings(fp8), host=host)
        return plan, next(one for one in plan.modules if one.kind == "Experts")

    plan, wide = planned(gpu, 14336)
    assert wide.is_swap and len(wide.least_rows) == 4 and all(500 < rows < 2048 for rows in wide.least_rows)
    assert "bf16 where FP8 is slower: wgrad, and fprop and dgrad below" in plan.banner()
    assert {product.parts for product in plan.products if product.label == "experts"} == {"fprop dgrad"}
    assert "experts' products that are faster in bf16" in plan.banner()
    assert plan_from_json(plan.to_json()) == plan
    plan, narrow = planned(gpu, 128)
    assert (
        not narrow.is_swap and "none of their products faster" in narrow.reason and '["*", "*experts"]' in narrow.reason
    )
    plan, narrow = planned(gpu, 128, dtype=torch.bfloat16)
    assert narrow.is_swap and narrow.least_rows == (0, 0, 0, 0)
    assert "all products in bf16, which is faster at these shapes" in plan.banner()
    assert not [product for product in plan.products if product.label == "experts" and product.fp8]
    for pattern in ("*experts", "model.layers.0.mlp.experts"):
        named = planned(gpu, 128, include=("*", pattern))[1]
        assert named.is_swap and not named.least_rows
    assert not planned(gpu, 14336, recipe="block")[1].is_swap
    assert not planned(Host("cuda", "NVIDIA L40S", (8, 9)), 14336)[1].is_swap
    plan, emulated = planned(Host(), 512)
    assert emulated.is_swap and not emulated.least_rows
    assert not [product.parts for product in plan.products if product.parts]


def test_least_rows_are_those_that_the_measured_shapes_had():
    """(out, in, layout) -> rows of the measurement and the products that won there (`expert_speed`, its source)."""
    for shape, rows, wins in (
        ((28672, 4096, False), 2048, (True, True)),
        ((4096, 14336, False), 2048, (True, True)),
        ((5760, 2880, True), 1024, (False, False)),
        ((2880, 2880, True), 1024, (False, False)),
        ((1536, 2048, False), 512, (False, False)),
        ((2048, 768, False), 512, (False, False)),
    ):
        high = high_precision(least_rows(*shape, False), rows)
        assert (not high.fprop, not high.dgrad) == wins and high.wgrad, shape
        cached = least_rows(*shape, True)
        assert all(one <= other for one, other in zip(cached, least_rows(*shape, False), strict=True))


def test_a_gated_layer_of_a_mixtures_family_is_no_router():
    """Qwen3.5-MoE's linear attention is a `...MoeGatedDeltaNet`: its projections were kept as routers."""
    layer = type("Qwen3_5MoeGatedDeltaNet", (nn.Module,), {})()
    layer.in_proj_qkv, layer.out_proj = nn.Linear(32, 96), nn.Linear(32, 32)
    gate = type("SomeMoeGate", (nn.Module,), {})()
    gate.linear = nn.Linear(32, 16)
    assert set(find_roles(nn.ModuleDict({"linear_attn": layer, "choice": gate}))) == {"choice.linear"}


def test_a_linear_may_hold_another_one():
    """Idefics' `lm_head` is an nn.Linear with further rows in a Linear of its own."""

    class Decoupled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 64)
            self.additional_fc = nn.Linear(32, 16)

    model = TinyModel(tied=False)
    model.lm_head = Decoupled()
    assert set(find_roles(model)) >= {"lm_head", "lm_head.additional_fc"}


def test_a_linear_that_holds_the_linear_it_adapts():
    """PEFT's RandLoRA is an nn.Linear around the model's own; looking for routers above that ended in a KeyError."""

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 32)
            self._parameters.pop("weight")
            self.base_layer = nn.Linear(32, 32)

        @property
        def weight(self):
            return self.base_layer.weight

        def forward(self, x):
            return self.base_layer(x) + x

    model = nn.Sequential(Adapted(), nn.Linear(32, 32))
    assert find_roles(model) == {}
    plan = make_plan(model, settings(), host=Host())
    assert {decision.fqn for decision in plan.modules if decision.is_swap} == {"0.base_layer", "1"}
    assert [reason for fqn, reason in ((each.fqn, each.reason) for each in plan.modules) if fqn == "0"] == [
        "it has no weight of its own, base_layer inside multiplies"
    ]
    assert all(product.fp8 for product in plan.products), "the outer one was counted as a product beside the inner one"
    assert find_roles(Adapted()) == {}


def test_a_layer_whose_mixer_multiplies_by_its_weight_is_kept_and_named():
    """Mamba-1's `dt_proj` is never called: converted, it would count as FP8 and run in none."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(64, 16))
            self.x_proj, self.dt_proj = nn.Linear(64, 48, bias=False), nn.Linear(16, 64)

    model = nn.ModuleDict({"mixer": Mixer()})
    assert {fqn: role.name for fqn, role in find_roles(model).items()} == {"mixer.dt_proj": "step size"}
    assert "multiplies by the weight itself" in find_roles(model)["mixer.dt_proj"].reason()


def test_a_gated_mlp_is_no_router():
    """Moshi's `MoshiGatingMLP` multiplies most of what the model does; a class called gating alone is a router."""

    class GatingMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(32, 128), nn.Linear(64, 32)

    class TopKGating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 4)

    model = nn.ModuleDict({"mlp": GatingMLP(), "router": TopKGating()})
    assert set(find_roles(model)) == {"router.layer"}
