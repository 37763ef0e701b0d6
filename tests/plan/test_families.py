"""docs/models.md says what becomes of each family of models; this writes its table and holds it true.

python -m tests.plan.test_families
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_fp8.capabilities import Host
from ds_fp8.plan import Plan, flops_share, make_plan
from tests.layers.small_models import settings

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->"

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3 8B": (
        "Llama",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        },
    ),
    "Qwen3 8B": (
        "Qwen3",
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        },
    ),
    "Mixtral 8x7B": ("Mixtral", {}),
    "Qwen3 30B-A3B": (
        "Qwen3Moe",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8,
        },
    ),
    "gpt-oss 20B": (
        "GptOss",
        {"num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4},
    ),
    "DeepSeek-V3": ("DeepseekV3", {}),
    "GPT-2": ("GPT2LMHeadModel", {}),
    "BERT base": ("BertForSequenceClassification", {}),
    "T5 base": (
        "T5ForConditionalGeneration",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    ),
    "ViT base": ("ViTForImageClassification", {"num_labels": 1000}),
}  # fmt: skip


def plan_of(name: str) -> Plan:
    import transformers

    short, sizes = FAMILIES[name]
    cls = getattr(transformers, short if "For" in short or "Head" in short else f"{short}ForCausalLM")
    with torch.device("meta"):
        model = cls(cls.config_class(**sizes))
    return make_plan(model, settings(), host=Host())


def row(name: str) -> str:
    plan = plan_of(name)
    converted: dict[str, int] = {}
    for decision in plan.swaps:
        converted[decision.kind] = converted.get(decision.kind, 0) + 1
    kept = [decision for decision in plan.modules if not decision.is_swap and decision.kind in ("Linear", "Experts")]
    names = ", ".join(dict.fromkeys(f"`{decision.fqn.split('.')[-1]}`" for decision in kept)) or "-"
    total = sum(product.macs for product in plan.products)
    rest: dict[str, float] = {}
    for product in plan.products:
        if not product.fp8:
            rest[product.label] = rest.get(product.label, 0.0) + product.macs / total
    shown = [f"{label} {share:.1%}" for label, share in sorted(rest.items(), key=lambda item: -item[1])]
    counts = ", ".join(f"{count} {kind}" for kind, count in converted.items())
    return f"| {name} | {counts} | {names} | {flops_share(plan):.1%} of {plan.length} | {', '.join(shown)} |"


def table() -> str:
    head = (
        "| model | in FP8 | kept layers | share of matrix FLOPs, tokens | in high precision |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(row(name) for name in FAMILIES) + "\n"


def test_the_table_of_the_page_is_what_the_plan_decides():
    pytest.importorskip("transformers")
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == table(), "run python -m tests.plan.test_families"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")
