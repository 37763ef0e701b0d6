"""transformers' mixtures, DeepSpeed's grouped experts and a class of one's own compute in FP8, in place."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import ds_fp8.experts
from ds_fp8.capabilities import Host
from ds_fp8.config.settings import LayerSettings
from ds_fp8.errors import PlanError
from ds_fp8.layers import restore_layers, swap_layers
from ds_fp8.layers.experts import Fp8Experts
from ds_fp8.layers.ran import Ran
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe
from tests.layers.small_models import settings, swapped

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32,
}  # fmt: skip
MIXTURES = {
    "Mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3},
    "GptOss": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "moe_intermediate_size": 48, "intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
    },
}  # fmt: skip


def mixture(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}ForCausalLM")
    sizes = {key: value for key, value in TEXT.items() if not (name == "DeepseekV3" and key == "head_dim")}
    model = cls(cls.config_class(**sizes, **MIXTURES[name]))
    for fqn, parameter in model.named_parameters():
        if "experts" in fqn:  # some of them leave `torch.empty`, or start too small to be seen beside the residual
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {fqn: module for fqn, module in model.named_modules() if fqn.endswith("mlp.experts")}


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {fqn: p.grad.clone() for fqn, p in model.named_parameters() if p.grad is not None}


def visit(module: nn.Module) -> dict[str, torch.Tensor]:
    """Output and gradients of one module of experts for a fixed routing, so that no token changes its expert."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 64, generator=generator).requires_grad_()
    index = torch.rand(40, module.num_experts, generator=generator).topk(2).indices
    module.zero_grad()
    out = module(x, index, torch.rand(40, 2, generator=generator))
    out.backward(torch.randn(40, 64, generator=generator))
    named = {fqn: p.grad.clone() for fqn, p in module.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **named}


@pytest.mark.parametrize("recipe", ["delayed", "block"])
@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_of_experts_beside_fp32(name, recipe):
    """Two products one after the other, three rounded operands in a gradient: 0.04 each in the mean square, and not
    0.
    """
    model = mixture(name)
    module = list(experts_of(model).values())[-1]
    (exact_loss, _), exact, names = loss_and_gradients(model), visit(module), list(model.state_dict())
    swapped(model, Recipe(kind=recipe, fp8_format="E4M3"), layers=LayerSettings(include=("*.mlp.experts",), norm=False))
    assert isinstance(module, Fp8Experts) and list(model.state_dict()) == names
    loss, _ = loss_and_gradients(model)
    assert loss != exact_loss and loss == pytest.approx(exact_loss, rel=0.01)
    for fqn, found in visit(module).items():
        error = float((found - exact[fqn]).norm() / exact[fqn].norm())
        assert (1e-3 < error < 0.1) or ("bias" in fqn and error < 0.1), (fqn, error)


OWN_CODE = {
    "Llama4": (
        "Llama4ForCausalLM", "feed_forward.experts",
        {"intermediate_size": 48, "intermediate_size_mlp": 64, "num_local_experts": 4, "attention_chunk_size": 32},
    ),
    "JetMoe": (
        "JetMoeForCausalLM", "_linear",
        {"intermediate_size": 48, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_CODE)
def test_experts_of_transformers_that_compute_by_code_of_their_own(name):
    """Llama 4 sends every token through every expert, JetMoE splits rows by lists: known without a registration."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls, end, sizes = OWN_CODE[name]
    text = {key: value for key, value in TEXT.items() if name != "JetMoe" or "heads" not in key}
    config = getattr(transformers, "Llama4TextConfig" if name == "Llama4" else f"{name}Config")(**text, **sizes)
    model = getattr(transformers, cls)(config).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    exact, gradients = loss_and_gradients(model)
    plan = make_plan(model, settings(), host=Host())
    modules = {fqn: module for fqn, module in model.named_modules() if fqn.endswith(end)}
    assert modules and all(plan.decision(fqn).is_swap for fqn in modules) and plan.unknown == ()
    counted = sum(product.macs for product in plan.products if product.label == "experts")
    visits = 4 if name == "Llama4" else 2
    assert counted == sum(p.numel() for module in modules.values() for p in module.parameters()) * visits / 4
    swapped(model, Recipe(kind="current", fp8_format="E4M3"), layers=LayerSettings(include=(f"*{end}",), norm=False))
    assert all(isinstance(module, Fp8Experts) for module in modules.values())
    loss, found = loss_and_gradients(model)
    assert loss != exact and loss == pytest.approx(exact, rel=0.02) and found.keys() == gradients.keys()
    assert all(found[f"{fqn}.{key}"].any() for fqn, module in modules.items() for key, _ in module.named_parameters())


def test_products_with_few_rows_run_in_high_precision():
    """`least_rows` of the plan, as on a GPU: (fprop, dgrad) of gate_up_proj, then of down_proj; wgrad never in FP8."""
    model = mixture("Mixtral")
    module = list(experts_of(model).values())[-1]
    exact = visit(module)
    found = {}
    for rows in ((1, 1, 1, 1), (1000, 1000, 1000, 1000), (0, 0, 0, 21), ()):  # 40 tokens visit 2 of 4 experts: 20 rows
        plan = make_plan(model, settings(layers=LayerSettings(include=("*.mlp.experts",), norm=False)), host=Host())
        modules = tuple(replace(one, least_rows=rows) if one.kind == "Experts" else one for one in plan.modules)
        swap_layers(model, replace(plan, modules=modules))
        state = module._ds_fp8_experts
        state.ran = Ran()
        found[rows] = visit(module)
        assert state.ran.small == (sum(rows) > 4) and state.ran.called
        restore_layers(model)
    errors = {
        rows: [float((one[key] - exact[key]).norm() / exact[key].norm()) for key in ("output", "input", "gate_up_proj")]
        for rows, one in found.items()
    }
    few = (1000, 1000, 1000, 1000)
    assert all(error < 1e-6 for error in errors[few]) and all(error < 1e-6 for error in errors[0, 0, 0, 21])
    assert all(1e-3 < error < 0.1 for error in errors[1, 1, 1, 1]) and all(1e-3 < error < 0.1 for error in errors[()])
    wgrad = [found[rows]["down_proj"] for rows in ((1, 1, 1, 1), ())]
    assert not torch.equal(*wgrad)


def test_they_are_planned_reported_and_given_back():
    model = mixture("Mixtral")
    classes = {fqn: type(module) for fqn, module in model.named_modules()}
    exact = loss_and_gradients(model)[0]
    plan = make_plan(model, settings(), host=Host())
    decision = plan.decision("model.layers.0.mlp.experts")
    assert (decision.kind, decision.target, decision.shape) == ("Experts", "Fp8Experts", (4, 192, 64))
    assert "2 of 2 Experts -> Fp8Experts (E4M3, current, one scale per row)" in plan.banner()
    assert not [product for product in plan.products if product.label == "experts" and not product.fp8]
    swapped(model)
    assert loss_and_gradients(model)[0] != exact
    restore_layers(model)
    assert {fqn: type(module) for fqn, module in model.named_modules()} == classes
    assert loss_and_gradients(model)[0] == exact


def test_high_precision_where_fp8_is_off():
    """In eval mode, before start_step, and where they are excluded."""
    model = mixture("Qwen3Moe").eval()
    tokens = torch.arange(24)[None]
    baseline = model(tokens).logits
    swapped(model)
    assert torch.equal(model(tokens).logits, baseline)
    restore_layers(model)
    exact = loss_and_gradients(model.train())[0]
    fp8_state = swapped(model, start_step=1, layers=LayerSettings(include=("*.experts",), norm=False))
    assert loss_and_gradients(model)[0] == exact
    fp8_state.weights_replaced(1)
    assert loss_and_gradients(model)[0] != exact
    restore_layers(model)
    swapped(model, layers=LayerSettings(exclude=("*.experts",), norm=False))
    assert not any(isinstance(module, Fp8Experts) for module in model.modules())


def test_copies_and_pickles():
    model = mixture("Mixtral")
    swapped(model, Recipe(kind="current"))
    expected = loss_and_gradients(model)[0]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert loss_and_gradients(copied)[0] == expected
        fp8_state = copied.__dict__["_ds_fp8_state"]
        assert all(module._ds_fp8_experts.fp8_state is fp8_state for module in experts_of(copied).values())
    assert loss_and_gradients(model)[0] == expected


def test_it_is_saved_and_loaded_as_the_unmodified_model(tmp_path):
    """save_pretrained says nothing of FP8; from_pretrained of an unmodified transformers gives the same weights."""
    transformers = pytest.importorskip("transformers")
    model = mixture("Mixtral")
    swapped(model)
    model.save_pretrained(tmp_path)
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    assert "fp8" not in (tmp_path / "config.json").read_text().lower()
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_unaligned_experts_are_kept_with_the_reason():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**TEXT, intermediate_size=90, num_local_experts=4)
    plan = make_plan(transformers.MixtralForCausalLM(config), settings(), host=Host())
    assert plan.decision("model.layers.1.mlp.experts").reason == "not a multiple of 16: 180, 90"
    assert "experts" in plan.banner() and "(not a multiple of 16: 180, 90)" in plan.banner()


def test_experts_of_another_rank_give_nothing():
    """Index `num_experts` is transformers' sign for them, under its expert parallelism."""
    model = mixture("Mixtral")
    swapped(model)
    module = next(iter(experts_of(model).values()))
    module._is_expert_parallel = True
    x = torch.randn(5, 64, requires_grad=True)
    index = torch.tensor([[0, 4], [4, 4], [1, 2], [3, 4], [4, 0]])
    out = module(x, index, torch.rand(5, 2))
    out.sum().backward()
    assert not out[1].any() and out[[0, 2, 3, 4]].any(1).all()
    assert not x.grad[1].any() and x.grad.isfinite().all()


def test_grouped_experts_of_deepspeed():
    """What AutoEP puts in a model: the same numbers as its own loop, within FP8's error."""
    module = pytest.importorskip("deepspeed.moe.ep_experts")
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = module.GroupedExperts(64, 96, 4, use_grouped_mm=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    counts, x = torch.tensor([5, 0, 20, 1]), torch.randn(28, 64)
    exact = model.experts(x, counts)
    exact.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    swapped(model, Recipe(kind="current"))
    found = model.experts(x, counts)
    found.sum().backward()
    assert found.dtype == exact.dtype and 0 < (found - exact).norm() / exact.norm() < 0.1
    for name, parameter in model.named_parameters():
        assert 0 < (parameter.grad - gradients[name]).norm() / gradients[name].norm() < 0.15, name


class Bilinear(nn.Module):
    """A class that nobody knows: it keeps [experts, in, out] and takes rows that are sorted already."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(3, 32, 48))

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        parts = x.split(counts.tolist())
        return torch.cat([part @ matrix for part, matrix in zip(parts, self.maps, strict=True)])


def test_a_class_of_ones_own():
    model = nn.Sequential()
    model.add_module("experts", Bilinear())
    with pytest.raises(PlanError, match="nothing would compute in FP8"):
        make_plan(model, settings(), host=Host())
    with pytest.raises(PlanError, match="maps: 'sideways'"):
        ds_fp8.experts.register(Bilinear, weights={"maps": "sideways"}, forward=lambda *_: None)
    ds_fp8.experts.register(
        Bilinear, weights={"maps": "in_out"}, forward=lambda module, linear, x, counts: linear("maps", x, counts)
    )
    try:
        x, counts = torch.randn(9, 32), torch.tensor([4, 0, 5])
        exact = model.experts(x, counts)
        swapped(model)
        assert 0 < (model.experts(x, counts) - exact).norm() / exact.norm() < 0.05
        assert make_plan(restore_layers(model), settings(), host=Host()).decision("experts").shape == (3, 48, 32)
    finally:
        ds_fp8.experts.unregister(Bilinear)


@pytest.mark.parametrize("recipe", ["current", "block"])
def test_weight_cache_casts_once_per_optimizer_step(recipe, monkeypatch):
    """Two micro-batches share what one cast; after a step, in eval mode and under no_grad everything is cast anew."""
    from ds_fp8.layers import grouped_blocks, grouped_rows

    module, name = (grouped_blocks, "_tiles") if recipe == "block" else (grouped_rows, "along_inputs")
    made, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: made.append(1) or original(*arguments))
    model = mixture("Mixtral")
    exact = copy.deepcopy(model)
    swapped(exact, Recipe(kind=recipe, fp8_format="E4M3"))
    expected = loss_and_gradients(exact)
    fp8_state = swapped(model, Recipe(kind=recipe, fp8_format="E4M3"), weight_cache=True)
    fp8_state.optimized = frozenset(map(id, model.parameters()))
    made.clear()
    found = loss_and_gradients(model)
    first = len(made)
    again = loss_and_gradients(model)
    assert len(made) == first > 0
    for run in (found, again):
        assert run[0] == expected[0] and all(torch.equal(run[1][key], expected[1][key]) for key in expected[1])
    fp8_state.weights_changed()
    loss_and_gradients(model)
    assert len(made) == 2 * first
    with torch.no_grad():
        model(torch.arange(24)[None])
    assert len(made) > 2 * first


@pytest.mark.parametrize("reentrant", [True, False])
def test_weight_cache_under_activation_checkpointing(reentrant):
    """The recompute finds what the forward has cast, and saves for the backward what the forward saved."""
    model = mixture("Mixtral")
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = []
    for one, cached in ((plain, False), (model, True)):
        fp8_state = swapped(one, Recipe(kind="current", fp8_format="E4M3"), weight_cache=cached)
        fp8_state.optimized = frozenset(map(id, one.parameters()))
        found.append([loss_and_gradients(one) for _ in range(2)])
    for (loss, gradients), (wanted, wanted_gradients) in zip(found[1], found[0], strict=True):
        assert loss == wanted and all(torch.equal(gradients[key], wanted_gradients[key]) for key in wanted_gradients)
