"""What is kept for what it is for: heads, routers, adapters; each by its name converts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_fp8.capabilities import Host
from ds_fp8.config.settings import Fp8Settings, LayerSettings, Settings
from ds_fp8.errors import PlanError
from ds_fp8.plan import make_plan
from ds_fp8.plan.roles import find_roles
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


def test_experts_stay_in_high_precision_on_a_gpu_unless_named():
    """Measured on an H100: right, and a quarter of bf16's speed. On a CPU, emulated, they are converted."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, vocab_size=96,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    gpu = Host("cuda", "NVIDIA H100", (9, 0))

    def experts(host, **layers):
        job = Settings(Fp8Settings(True, backend="torch", layers=LayerSettings(**layers)))
        found = [one for one in make_plan(model, job, host=host).modules if one.kind == "Experts"]
        assert len(found) == 1
        return found[0]

    assert experts(Host()).is_swap
    kept = experts(gpu)
    assert not kept.is_swap and "4 to 7 times as long" in kept.reason and '["*", "*experts"]' in kept.reason
    assert experts(gpu, include=("*", "*experts")).is_swap
    assert experts(gpu, include=("model.layers.0.mlp.experts",)).is_swap
