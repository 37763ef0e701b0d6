"""A Llama with Liger Kernel, or with another attention, under our layers: what `test_llama_peers.py` and the
interpreter run.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_fp8.config import CompileSettings
from ds_fp8.layers.ran import watch
from ds_fp8.recipe import Recipe
from tests.layers.small_models import swapped


def train(device: str, *, fp8: bool, liger: bool = False, attention: str = "sdpa", compiled: bool = False,
          steps: int = 4,
          width: int = 128, tokens: int = 64) -> tuple[list[float], list[str]]:  # fmt: skip
    """Losses of some steps on the same tokens, and the names of FP8 layers that did not run all three products."""
    import transformers

    torch.manual_seed(0)
    heads = 2
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=1, vocab_size=256, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16).train()
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)  # what TrainingArguments(use_liger_kernel=True) does
    fp8_state = None
    if fp8:
        how: dict[str, Any] = {"compile": CompileSettings()} if compiled else {}
        fp8_state = swapped(model, Recipe(amax_history_len=4), managed=True, backend="torch", **how)
        fp8_state.to(torch.device(device, 0) if device == "cuda" else torch.device(device))
    layers = [module for module in model.modules() if hasattr(module, "layer_state")]
    ran = watch(layers, on=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = torch.randint(0, 256, (2, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if fp8_state is not None:
            fp8_state.update_scales()
        optimizer.step()
        optimizer.zero_grad()
        if fp8_state is not None:
            fp8_state.weights_changed()
        losses.append(float(loss.detach()))
    lazy = [
        layer.layer_state.fqn
        for layer, one in zip(layers, ran, strict=True)
        if not (one.fprop and one.dgrad and one.wgrad)
    ]
    watch(layers, on=False)
    return losses, lazy if layers else ["no layer is FP8"]
