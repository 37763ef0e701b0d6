"""Hugging Face's Llama with random weights under ZeRO-2, gas 2, micro-batch 4 x 2048: eager against eager, compiled
against compiled.

    8B width   8 layers, hidden 4096, ffn 14336, 32 heads over 8, vocabulary 32000: 2.0B parameters
    1B         Llama-3.2-1B's shapes: 16 layers, hidden 2048, ffn 8192, 32 heads over 8, vocabulary 128256, tied

Bases are bf16 eager, bf16 with `engine.compile()` and bf16 with each decoder layer compiled (as `fp8.compile` does it).
"""

from __future__ import annotations

from typing import Any

import torch
from gpt_model import Block
from jobs import FP8, train
from ledger import Ledger, main
from timing import alternate, free
from torch import nn

COMMON = {"micro_batch": 4, "context": 2048, "gas": 2, "steps": 9, "stage": 2, "steps_timed_apart": True}
MODELS: dict[str, dict[str, Any]] = {
    "8B width": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 32000},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
}  # fmt: skip


def ours(level: str | None = "O2", **fp8: Any) -> dict[str, Any]:
    msamp = {} if level is None else {"msamp": {"enabled": True, "opt_level": level}}
    return {"sections": {"fp8": FP8 | {"layers": {"library_norms": True}} | fp8, **msamp}}


ROWS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, engine.compile": {"compiled": "engine"},
    "bf16, blocks compiled": {"compiled": "blocks"},
    "O2 + fp8": ours(),
    "O2 + fp8, fp8.compile": ours(compile=True),
    "O3 + fp8, fp8.compile": ours("O3", compile=True),
    "torchao, blocks compiled": {"compiled": "blocks", "peer": "torchao"},
    "O2 + fp8, engine.compile": ours() | {"compiled": "engine"},
    "O2 + fp8, weight_cache, fp8.compile": ours(compile=True, weight_cache=True),
    "fp8": ours(None),
    "Accelerate convert_model": {"peer": "accelerate"},
}


FIRST = 6
"""Rows that both models get before either gets the others: a budget may end early."""


def body(ledger: Ledger) -> None:
    found: dict[str, list[dict[str, Any]]] = {model: [] for model in MODELS}
    names = list(ROWS)
    for part in (names[:FIRST], None, names[FIRST:]):
        if part is None:
            ledger.attempt("small layers, CUDA graphs, 4K tokens", small_layers, needs_s=40)
            continue
        for model, rows in found.items():
            for name in part:
                measure(ledger, model, name, rows)


def measure(ledger: Ledger, model: str, name: str, rows: list[dict[str, Any]]) -> None:
    """One training in a process of its own, and its ratio to each base."""
    if ledger.left() < 40:
        ledger.problem(f"{model}: {name}", f"{ledger.left():.0f} s of the budget are left")
        return
    job = COMMON | ROWS[name] | {"llama": MODELS[model], "plugin": "sections" in ROWS[name]}
    found = train(job, min(ledger.left() - 5, 150))
    if "ms per step" not in found:
        ledger.problem(f"{model}: {name}", str(found))
        return
    losses = found.pop("losses")
    bases = {row["run"]: row["ms per step"] for row in rows} | {name: found["ms per step"]}
    ratios = {
        f"x {base}": round(bases[base] / found["ms per step"], 3) if base in bases else ""
        for base in ("bf16", "bf16, engine.compile", "bf16, blocks compiled")
    }
    rows.append({"run": name, **found, **ratios, "last losses": str(losses)})
    ledger.record(model, rows)


def small_layers() -> list[dict[str, Any]]:
    """Forward and backward of two blocks, replayed as a CUDA graph: where the host's time is gone."""
    from ds_fp8.recipe import Recipe
    from tests.layers.small_models import swapped

    rows = []
    for width in (1024, 2048):
        works = {}
        x = torch.randn(2, 2048, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn_like(x) * 1e-3
        for name in ("bf16", "fp8 delayed", "fp8 current"):
            torch.manual_seed(0)
            model = nn.Sequential(Block(width, 4 * width), Block(width, 4 * width)).to("cuda", torch.bfloat16)
            fp8_state = None
            if name != "bf16":
                fp8_state = swapped(model, Recipe(kind=name.split()[1]), managed=True, backend="torch")
                fp8_state.to(x.device)  # as an engine does; else it would move when a graph is recorded
            for block in model:
                block.compile(mode="reduce-overhead")
            for leaf in (x, *model.parameters()):  # a graph's own gradient lives until its next replay only
                leaf.grad = torch.zeros_like(leaf)

            def once(
                model: nn.Module = model,
                fp8_state: Any = fp8_state,
                x: torch.Tensor = x,
                gradient: torch.Tensor = gradient,
            ) -> None:
                torch.compiler.cudagraph_mark_step_begin()
                model(x).backward(gradient)
                if fp8_state is not None:
                    fp8_state.update_scales()

            for _ in range(4):
                once()
                if fp8_state is not None:
                    fp8_state.weights_changed()
            works[name] = once
        times = alternate(works)
        rows += [
            {"width": width, "run": name, **found, "x bf16": round(times["bf16"]["ms"] / found["ms"], 3)}
            for name, found in times.items()
        ]
        free()
    return rows


if __name__ == "__main__":
    main("llama", body)
