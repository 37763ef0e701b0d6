"""The share of FP8: counted by shapes, beside a count by hand and beside torch's own counter of a real forward."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ds_fp8.capabilities import Host
from ds_fp8.config.settings import LayerSettings
from ds_fp8.plan import flops_share, make_plan, share_line
from ds_fp8.plan.flops import Counted, count_products, starred
from ds_fp8.recipe import HighPrecision, Recipe
from tests.layers.small_models import Block, TinyModel, settings

TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTH = {"max_position_embeddings": 24}
CHUNK = {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HYBRID = ["linear_attention", "full_attention"]
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
MODELS = {
    "LlamaForCausalLM": {**TEXT, **LENGTH, "intermediate_size": 64, "num_key_value_heads": 1},
    "MixtralForCausalLM": {
        **TEXT, **LENGTH, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4,
    },
    "Qwen3MoeForCausalLM": {
        **TEXT, **LENGTH, "moe_intermediate_size": 48, "num_key_value_heads": 2, "num_experts": 8,
        "num_experts_per_tok": 3, "head_dim": 16,
    },
    "GptOssForCausalLM": {
        **TEXT, **LENGTH, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "head_dim": 16,
    },
    "DeepseekV3ForCausalLM": {
        **TEXT, **LENGTH, "intermediate_size": 64, "moe_intermediate_size": 48, "num_key_value_heads": 2,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
    "OlmoeForCausalLM": {**TEXT, **LENGTH, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "PhimoeForCausalLM": {
        **TEXT, **LENGTH, "intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 2,
    },
    "GraniteMoeForCausalLM": {
        **TEXT, **LENGTH, "intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 2,
    },
    "GraniteMoeHybridForCausalLM": {
        **TEXT, **LENGTH, "intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 2,
        "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 24,
    },
    "KimiLinearForCausalLM": {
        **TEXT, **CHUNK, "intermediate_size": 64, "moe_intermediate_size": 48, "num_key_value_heads": 2,
        "num_local_experts": 8, "num_experts_per_tok": 2, "linear_num_heads": 2, "linear_head_dim": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "layer_types": HYBRID, "mlp_layer_types": ["dense", "sparse"],
    },
    "Qwen3NextForCausalLM": {
        **TEXT, **CHUNK, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": HYBRID,
    },
    "DeepseekV32ForCausalLM": {
        **TEXT, **CHUNK, "intermediate_size": 64, "moe_intermediate_size": 48, "num_key_value_heads": 2,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "index_n_heads": 4, "index_head_dim": 32, "index_topk": 16, "head_dim": 8,
    },
    "MiniMaxForCausalLM": {
        **TEXT, **CHUNK, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 16,
        "block_size": 16, "layer_types": HYBRID,
    },
    "Mamba2ForCausalLM": {
        **{key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}, "num_heads": 4,
        "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 32, **CHUNK,
    },
    "JambaForCausalLM": {
        **TEXT, **CHUNK, "intermediate_size": 64, "num_key_value_heads": 2, "num_experts": 4, "mamba_dt_rank": 16,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "xLSTMForCausalLM": {
        **{key: TEXT[key] for key in ("vocab_size", "hidden_size")}, "num_blocks": 1, "num_heads": 2, "chunk_size": 16,
        "use_cache": False, **CHUNK,
    },
    "RwkvForCausalLM": {
        **{key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}, "context_length": 24,
    },
    "RecurrentGemmaForCausalLM": {
        **TEXT, **LENGTH, "intermediate_size": 192, "lru_width": 32, "num_hidden_layers": 3,
    },
    "Lfm2ForCausalLM": {
        **TEXT, **LENGTH, "intermediate_size": 64, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
    },
    "DiffLlamaForCausalLM": {**TEXT, **LENGTH, "intermediate_size": 64, "num_key_value_heads": 2},
    "OPTForCausalLM": {**TEXT, **LENGTH, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "PhiForCausalLM": {**TEXT, **LENGTH, "intermediate_size": 64},
    "GPTNeoXForCausalLM": {**TEXT, **LENGTH, "intermediate_size": 64},
    "FalconForCausalLM": {**TEXT, **LENGTH},
    "BertForSequenceClassification": {**TEXT, **LENGTH, "intermediate_size": 64, "num_labels": 16},
    "LlamaForSequenceClassification": {
        **TEXT, **LENGTH, "intermediate_size": 64, "num_key_value_heads": 1, "num_labels": 16, "pad_token_id": 0,
    },
    "WhisperForConditionalGeneration": {
        "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 24,
        "max_target_positions": 24, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "GPT2LMHeadModel": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 24},
    "BertForMaskedLM": {**TEXT, **LENGTH, "intermediate_size": 64},
    "T5ForConditionalGeneration": {
        "vocab_size": 96, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "n_positions": 24,
    },
    "SwitchTransformersForConditionalGeneration": {
        "vocab_size": 96, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
        "d_kv": 16, "n_positions": 24, "num_experts": 16, "expert_capacity": 64, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "ViTForImageClassification": {
        **{key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 16,
    },
}  # fmt: skip


def built(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls._from_config(cls.config_class(**MODELS[name]), **({} if "Switch" in name else EAGER)).eval()


def by_torch(model: nn.Module, name: str, length: int) -> Counter[str]:
    """Module -> FLOPs of its own in one real forward of one sequence, as torch counts them while it runs.

    Attention is eager: the fused kernels of a CPU are not among the products that torch counts.
    """
    tokens = torch.randint(3, 96, (1, length))
    inputs = {"input_ids": tokens}
    if "ViT" in name:
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    elif "Whisper" in name:
        inputs = {"input_features": torch.randn(1, 8, 2 * length)}
    if "ForConditional" in name:
        inputs["decoder_input_ids"] = tokens
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    found = {path.partition(".")[2]: sum(flops.values()) for path, flops in counter.get_flop_counts().items()}
    found[""] = counter.get_total_flops()
    own = Counter(found)
    for path in filter(None, found):
        above = path.rpartition(".")[0]
        while above not in found:
            above = above.rpartition(".")[0]
        own[above] -= found[path]
    return _by_module(own, model)


def by_plan(counted: Counted, model: nn.Module) -> Counter[str]:
    flops: Counter[str] = Counter()
    for product in counted.products:
        flops[product.name] += 2 * counted.length * product.macs
    return _by_module(flops, model)


def _by_module(flops: Counter[str], model: nn.Module) -> Counter[str]:
    """Layers of equal place and all experts in one; parameters and what a mixer does by itself with their module."""
    modules = {starred(fqn) for fqn, _ in model.named_modules()}
    merged: Counter[str] = Counter()
    for path, count in flops.items():
        name = starred(path)
        if name not in modules or (name.endswith((".conv1d", ".dt_proj", "_backend")) and "layer" in name):
            name = name.rpartition(".")[0]
        merged[re.sub(r"expert_\d+", "expert_*", name)] += count
    return merged


UNSEEN = {
    # Multiplied by element and summed in transformers' reference: keys with keys, and queries with keys.
    "KimiLinearForCausalLM": ("model.layers.*.self_attn", 2 * 64 * 64 * 2 * (16 + 16)),
    # A triangular solve where kernels multiply: both halves of the WY form.
    "Qwen3NextForCausalLM": ("model.layers.*.linear_attn", 2 * 64 * 64 * 4 * (16 + 16)),
    # The first convolution sees two frames for each token of the encoder; the plan counts it once per token.
    "WhisperForConditionalGeneration": ("model.encoder.conv1", -2 * 24 * 3 * 8 * 32),
}
"""FLOPs that torch's counter does not see and the plan counts: (in which module, how many), by hand."""


@pytest.mark.parametrize("name", MODELS)
def test_the_count_by_shapes_is_torchs_count_of_a_real_forward(name):
    """2 FLOPs for a multiply-add: in all, in every module, and in the share that the plan computes in FP8."""
    model = built(name)
    counted = count_products(model, ())
    ours, torchs = by_plan(counted, model), by_torch(model, name, counted.length)
    where, unseen = UNSEEN.get(name, ("", 0))
    torchs[where] += unseen
    # Rotary tables are products of their own (length x head / 2), and the patches of a ViT are one less than its
    # tokens.
    total = torchs.total()
    assert ours.total() == pytest.approx(total, rel=0.01)
    wrong = {
        path: (ours[path], torchs[path]) for path in {*ours, *torchs} if abs(ours[path] - torchs[path]) > 0.01 * total
    }
    assert wrong == {}
    assert counted.unknown == ()
    plan = make_plan(model, settings(), host=Host())
    fp8 = {decision.fqn for decision in plan.swaps}
    theirs = sum(torchs[path] for path in _by_module(Counter(dict.fromkeys(map(starred, fp8), 0)), model))
    assert 0.02 < flops_share(plan) == pytest.approx(theirs / total, abs=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_routers_are_kept_and_named(name):
    """The banner says what share of the model they are, and the plan which key converts them."""
    model = built(name)
    plan = make_plan(model, settings(), host=Host())
    names = {id(module): fqn for fqn, module in model.named_modules()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = [
        names[id(head)] for head in (output, *(getattr(model, part, None) for part in ("classifier", "score"))) if head
    ]
    assert heads
    routers = [fqn for fqn, module in model.named_modules() if "Router" in type(module).__name__]
    linear = [fqn for fqn in [*heads, *(f"{fqn}.classifier" for fqn in routers)] if fqn in names.values()]
    for fqn in linear:
        decision = plan.decision(fqn)
        assert decision is not None and not decision.is_swap and decision.reason, fqn
        assert any(word in decision.reason for word in ("layers/include", "shared", "tied")), decision.reason
    high = {product.name: product.label for product in plan.products if not product.fp8}
    assert set(heads) <= set(high)
    assert "score" not in heads or "score" in plan.banner()
    if routers:
        assert "routers" in high.values() and "routers" in plan.banner()


def test_by_hand():
    """Mixtral of one layer, per token: q, o 32*32 each, k, v 32*32, attention 24*64, experts 2 * (96*32 + 32*48)."""
    pytest.importorskip("transformers")
    plan = make_plan(built("MixtralForCausalLM"), settings(), host=Host())
    linear, attention, experts, router, head = 2 * 4 * 1024, 2 * 24 * 64, 2 * 2 * (96 + 48) * 32, 2 * 4 * 32, 96 * 32
    macs = dict.fromkeys(("layers", "attention", "experts", "routers", "lm_head"), 0.0)
    for product in plan.products:
        macs[product.label] += product.macs
    assert macs == {
        "layers": linear, "attention": attention, "experts": experts, "routers": router, "lm_head": head
    }  # fmt: skip
    in_fp8 = sum(product.macs for product in plan.products if product.fp8)
    assert flops_share(plan) == in_fp8 / (linear + attention + experts + router + head)
    half = flops_share(plan, without=["model.layers.0.mlp.experts"])
    assert half == pytest.approx((linear + experts / 2) / (linear + attention + experts + router + head))


def test_the_model_is_not_run_and_meta_and_zero_init_count_the_same():
    """Under zero.Init a parameter is empty and carries its shape as ds_shape."""
    model = TinyModel(blocks=3, tied=False)
    model.forward = None
    expected = count_products(model, ())
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    assert count_products(model, ()) == expected
    with torch.device("meta"):
        assert count_products(TinyModel(blocks=3, tied=False), ()) == expected


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "GPT2LMHeadModel"])
def test_a_plan_under_zero_init_is_the_plan_of_the_whole_model(name):
    """Stacked experts and Conv1D too are planned by the shapes that parameters carry."""
    model = built(name)
    expected = make_plan(model, settings(), host=Host())
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    assert make_plan(model, settings(), host=Host()).digest() == expected.digest()


def test_the_sentence_and_the_warning():
    plan = make_plan(TinyModel(tied=False), settings(), host=Host())
    total = 2 * 2 * 32 * 48 + 32 * 64
    assert flops_share(plan) == 2 * 2 * 32 * 48 / total
    assert (
        share_line(plan) == "75% of the model's matrix FLOPs in FP8 (assuming sequences of 2048 tokens); not: head 25%"
    )
    assert "WARNING" not in plan.banner()
    some = make_plan(TinyModel(tied=False), settings(layers=LayerSettings(include=("*.up",))), host=Host())
    assert "38% of the model's" in share_line(some) and "not: down 38%, head 25%" in share_line(some)
    assert "WARNING: only 38% of the matrix FLOPs compute in FP8" in some.banner() and "1.23x" in some.banner()
    high = make_plan(
        TinyModel(tied=False), settings(Recipe(override_linear_precision=HighPrecision(wgrad=True))), host=Host()
    )
    assert flops_share(high) == pytest.approx(2 / 3 * 0.75)
    assert "products in high precision by override_linear_precision 25%" in share_line(high)


def test_a_frozen_weight_has_no_wgrad():
    model = TinyModel(blocks=1, tied=False)
    model.blocks[0].up.weight.requires_grad_(False)
    up = down = 32 * 48
    plan = make_plan(model, settings(), host=Host())
    assert flops_share(plan) == (2 * up + 3 * down) / (2 * up + 3 * down + 3 * 32 * 64)


class Odd(nn.Module):
    """A bare matrix, a stack without a router, a table, and a learned start token."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.core = nn.Parameter(torch.zeros(32, 48))
        self.stack = nn.Parameter(torch.zeros(4, 32, 48))
        self.position_table = nn.Parameter(torch.zeros(128, 32))
        self.start = nn.Parameter(torch.zeros(1, 1, 32))


def test_parameters_that_no_rule_knows_are_named():
    plan = make_plan(Odd(), settings(), host=Host())
    assert plan.unknown == ("core [32, 48]", "stack [4, 32, 48]")
    assert "in no count, no rule knows them: core [32, 48], stack [4, 32, 48]" in plan.banner()


def test_layers_whose_weight_is_computed_count_too():
    """weight_norm keeps the weight as two parameters of other names; a convolution of its groups multiplies by less."""
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(
        weight_norm(nn.Linear(32, 48)),
        weight_norm(nn.Conv1d(32, 64, 3, groups=4)),
        nn.utils.weight_norm(nn.Linear(48, 16)),
    )
    counted = count_products(model, ())
    assert [product.macs for product in counted.products] == [32 * 48 + 48 * 16, 64 * 32 // 4 * 3]
    assert counted.unknown == ()


def test_experts_in_a_list_count_by_the_share_of_tokens_that_visits_them():
    """DeepSpeed's MoE layer of 8 experts, top-2: of each expert a quarter of the tokens."""

    class TopKGate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.wg = 2, nn.Linear(32, 8, bias=False)

    layer = nn.Module()
    layer.gate, layer.experts = TopKGate(), nn.ModuleList(nn.Linear(32, 64) for _ in range(8))
    counted = {product.name: product.macs for product in count_products(layer, ()).products}
    assert counted == {"gate.wg": 32 * 8, "experts.*": 2 * 32 * 64}


def test_an_8b_model_takes_well_under_a_second():
    import time

    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    begin = time.process_time()
    count_products(model, ())
    assert time.process_time() - begin < 1
