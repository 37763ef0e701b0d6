"""A Llama with Liger Kernel, or with another attention, in bf16 or in FP8: what `test_llama_peers.py` runs.

`python -m tests.gpu.llama_peers '{"fp8": true, "liger": true}'` trains in a process of its own and prints the Training
as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from ds_fp8.config import CompileSettings
from ds_fp8.layers.ran import watch
from ds_fp8.recipe import Recipe
from tests.layers.small_models import swapped


class Training(NamedTuple):
    """What a training gave.

    losses  one per step
    lazy    names of FP8 layers that did not run all three products
    breaks  reasons of torch.compile's graph breaks, with how often each
    """

    losses: list[float]
    lazy: list[str]
    breaks: dict[str, int]


@contextmanager
def liger_applied(model: Any) -> Iterator[None]:
    """Liger Kernel in `model`, as TrainingArguments(use_liger_kernel=True) applies it, and nowhere afterwards.

    Liger patches Transformers' module as well as the model: from then on every Llama of the process has its rotary
    embeddings, which it excludes from torch.compile.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    try:
        _apply_liger_kernel_to_instance(model)
        yield
    finally:
        vars(modeling_llama).update(before)


def train(device: str, *, fp8: bool, liger: bool = False, attention: str = "sdpa", compiled: bool = False,
          steps: int = 4, width: int = 128, tokens: int = 64) -> Training:  # fmt: skip
    """Some steps on the same tokens.

    compiled  each block by itself: with FP8 by `fp8.compile`, in bf16 by `nn.Module.compile`
    """
    import transformers

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    heads = 2
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=1, vocab_size=256, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16).train()
    with liger_applied(model) if liger else nullcontext():
        losses, lazy = _train(model, device, fp8=fp8, compiled=compiled, steps=steps, tokens=tokens)
    return Training(losses, lazy, dict(torch._dynamo.utils.counters["graph_break"]))


def _train(model: Any, device: str, *, fp8: bool, compiled: bool, steps: int, tokens: int) -> tuple[list, list[str]]:
    fp8_state = None
    if fp8:
        how: dict[str, Any] = {"compile": CompileSettings()} if compiled else {}
        fp8_state = swapped(model, Recipe(amax_history_len=4), managed=True, backend="torch", **how)
        fp8_state.to(torch.device(device, 0) if device == "cuda" else torch.device(device))
    elif compiled:
        for block in model.model.layers:
            block.compile()
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
    return losses, lazy if layers or not fp8 else ["no layer is FP8"]


if __name__ == "__main__":
    print("TRAINING " + json.dumps(train("cuda", **json.loads(sys.argv[1]))._asdict()), flush=True)
