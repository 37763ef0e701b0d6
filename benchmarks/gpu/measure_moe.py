"""The expert block of a mixture, forward and backward: FP8 by rows beside transformers' grouped bf16.

Whole modules with transformers' own classes and random weights: sort, gather, casts, products, activation, sum. Tokens
are spread over the experts as an untrained router would: evenly but for chance. Goals (one H100): Mixtral 1.35x,
gpt-oss
1.25x, Qwen3-30B-A3B not slower than bf16.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from ledger import Ledger, main
from timing import alternate, free
from torch import nn

from ds_fp8.config.settings import Fp8Settings, LayerSettings, Settings
from ds_fp8.errors import PlanError
from ds_fp8.formats import E4M3
from ds_fp8.kernels.grouped import quantize_experts
from ds_fp8.layers import QuantizedWeight, holders_of, swap_layers
from ds_fp8.plan import make_plan
from ds_fp8.plan.parameters import with_scales_of_whole_experts
from ds_fp8.recipe import HighPrecision, Recipe

MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "Mixtral 8x7B": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, 2, 8192),
    "gpt-oss 20B": ("GptOss", {"num_local_experts": 32, "num_experts_per_tok": 4}, 4, 8192),
    "Qwen3 30B-A3B": (
        "Qwen3Moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
        8,
        8192,
    ),
    "Phi-3.5-MoE, not fitted": ("Phimoe", {"num_local_experts": 16}, 2, 8192),
    "OLMoE, not fitted": ("Olmoe", {}, 8, 8192),
    "gpt-oss 20B, 32K tokens": ("GptOss", {"num_local_experts": 32, "num_experts_per_tok": 4}, 4, 32768),
}
"""Name -> family, sizes, experts that a token visits, tokens. `ds_fp8.plan.expert_speed` was fitted without those that
say so: their default row tells whether it chooses well where nobody measured."""


def experts_of(family: str, sizes: dict[str, Any]) -> nn.Module:
    """The experts of one layer, in bf16 on the device, by transformers' grouped products."""
    import transformers

    cls = getattr(transformers, f"{family}ForCausalLM")
    config = cls.config_class(**sizes, num_hidden_layers=1, vocab_size=128)
    with torch.device("cuda"):
        model = cls._from_config(config, experts_implementation="grouped_mm", dtype=torch.bfloat16)
    experts = next(module for name, module in model.named_modules() if name.endswith("mlp.experts"))
    holder = nn.Module()
    holder.experts = experts
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.02)
    return holder.to("cuda").train()


BF16 = HighPrecision(True, True, True)
WGRAD = HighPrecision(wgrad=True)
NAMED = LayerSettings(include=("*experts",))

VARIANTS: dict[str, tuple[LayerSettings, dict[str, Any]]] = {
    "FP8 by default": (LayerSettings(norm=False), {}),
    "fprop, dgrad in FP8": (NAMED, {"override_linear_precision": WGRAD}),
    "all in FP8": (NAMED, {}),
    "none in FP8": (NAMED, {"override_linear_precision": BF16}),
}
"""Row -> which layers, and the recipe's keys. The last is our handling of rows, biases and gates alone. By default
products are
in FP8 where `ds_fp8.plan.expert_speed` expects them to be faster."""

CACHED = "fprop, dgrad in FP8, weights cast before"
"""`weight_cache` in every micro-batch but the first."""

GIVEN = "weights given in FP8 (O3, frozen)"
"""Cast outside of the module with one scale per expert: fprop and dgrad read the same data."""


def swapped(baseline: nn.Module, layers: LayerSettings, *, cached: bool = False, **recipe: Any) -> nn.Module:
    model = copy.deepcopy(baseline)
    fp8 = Recipe(kind="current", fp8_format="E4M3", **recipe)
    settings = Settings(Fp8Settings(True, recipe=fp8, backend="torch", layers=layers, weight_cache=cached))
    fp8_state = swap_layers(model, make_plan(model, settings, device="cuda"))
    fp8_state.optimized = frozenset(map(id, model.parameters()))
    return model


def with_given_weights(baseline: nn.Module) -> nn.Module:
    """Experts as O3 leaves them between steps, but for the Parameters, which keep their 16 bits."""
    model = copy.deepcopy(baseline)
    fp8 = Recipe(kind="current", fp8_format="E4M3")
    plan = make_plan(model, Settings(Fp8Settings(True, recipe=fp8, backend="torch", layers=NAMED)), device="cuda")
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    modules = with_scales_of_whole_experts(model, plan.modules, names)
    swap_layers(model, replace(plan, modules=tuple(replace(one, least_rows=(1,) * 4) for one in modules)))
    for name, holder in holders_of(model.experts).items():
        weight = model.experts.get_parameter(name)
        holder.quantized_weight = QuantizedWeight(*quantize_experts(weight.detach(), E4M3))
        holder.quantized_weight_of = weight
    return model


def passes(
    model: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor
) -> Any:
    def once() -> None:
        model.zero_grad()
        x.grad = None
        model.experts(x, index, weights).backward(gradient)

    return once


def error(baseline: nn.Module, fp8: nn.Module, arguments: tuple[torch.Tensor, ...]) -> float:
    """Relative error of the output and of the worst weight gradient, against bf16: the work timed is the right work."""
    found = []
    for model in (baseline, fp8):
        passes(model, *arguments)()
        with torch.no_grad():
            output = model.experts(*arguments[:3]).float()
        found.append([output, *(parameter.grad.float() for parameter in model.parameters())])
    return max(float((a - b).norm() / b.norm()) for b, a in zip(*found, strict=True))


def body(ledger: Ledger) -> None:
    rows: list[dict[str, Any]] = []
    for name, (family, sizes, visits, tokens) in MODELS.items():
        if ledger.left() < 25:
            ledger.problem(name, "no time left")
            continue
        torch.manual_seed(0)
        baseline = experts_of(family, sizes)
        width, count = baseline.experts.config.hidden_size, baseline.experts.num_experts
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        chosen = torch.rand(tokens, count, device="cuda").topk(visits)
        weights = chosen.values.softmax(-1).to(torch.bfloat16)
        arguments = (x, chosen.indices, weights, torch.randn_like(x) * 1e-3)
        models = {"bf16 grouped": baseline}
        cached = {CACHED: (NAMED, {"override_linear_precision": WGRAD}), GIVEN: (NAMED, {})}
        for key, (layers, recipe) in (VARIANTS | cached).items():
            try:
                given = key == GIVEN
                models[key] = (
                    with_given_weights(baseline) if given else swapped(baseline, layers, cached=key == CACHED, **recipe)
                )
                found = error(baseline, models[key], arguments)
                ledger.problem(f"{name} {key}", f"differs from bf16 by {found:.3f}") if found > 0.15 else None
            except PlanError:
                models.pop(key, None)
                ledger.record(f"{name}, {key}", "kept in bf16: none of its products is expected to be faster")
            except Exception as problem:  # noqa: BLE001 - which ones run is a finding
                models.pop(key, None)
                ledger.problem(f"{name} {key}", f"{type(problem).__name__}: {str(problem)[:300]}")
        times = alternate({key: passes(model, *arguments) for key, model in models.items()}, repeats=7, warmup=2)
        for key, time in times.items():
            ratio = round(times["bf16 grouped"]["ms"] / time["ms"], 3)
            row = {"experts": name, "tokens": tokens, "rows": tokens * visits, "products": key}
            rows.append(row | {"ms": time["ms"], "spread": time["spread"], "x bf16": ratio})
        ledger.record("expert block, forward and backward", rows)
        del baseline, models, x, chosen, weights, arguments
        free()


if __name__ == "__main__":
    main("moe", body)
