"""`fp8.compile` in families of Transformers' models: graphs break and are compiled anew no more often than in bf16.

The control is the model in bf16 whose blocks are compiled in the same way. Both train with gas 2 over batches of
several lengths, with evaluations between; FP8 begins at `start_step`. `aot_eager` traces what Inductor would get.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ds_fp8.config import CompileSettings
from ds_fp8.layers.blocks import repeated_blocks
from ds_fp8.recipe import Recipe
from tests.layers.small_models import swapped

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

LENGTHS = (16, 16, 24, 32, 16, 40, 20, 24)
WORDS = 96
DECODER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": WORDS, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def gemma3() -> Any:
    """Layers with a sliding window and one without: `1 + weight` norms before and after each part."""
    sizes = DECODER | {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    )


def bert() -> Any:
    """Biases, and dropout inside of the blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=WORDS))


def whisper() -> Any:
    """Two stacks of blocks, one of which attends to the other."""
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 128}.items()
    }
    config = transformers.WhisperConfig(
        **sides, d_model=64, vocab_size=WORDS, num_mel_bins=16, max_source_positions=24, max_target_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def text(length: int) -> dict[str, torch.Tensor]:
    words = torch.randint(3, WORDS, (2, length), generator=torch.Generator().manual_seed(length))
    padded = torch.ones_like(words)
    padded[0, -2:] = 0
    return {"input_ids": words, "labels": words, "attention_mask": padded}


def speech(length: int) -> dict[str, torch.Tensor]:
    sound = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(length)).bfloat16()
    return {"input_features": sound, "labels": text(length)["labels"]}


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, torch.Tensor]]]] = {
    "gemma3": (gemma3, text),
    "mixtral": (mixtral, text),
    "bert": (bert, text),
    "whisper": (whisper, speech),
}


def train(family: str, *, fp8: bool) -> tuple[int, int, int]:
    """(graph breaks, graphs, graphs of the second pass over all lengths)"""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.manual_seed(0)
    make, batch = FAMILIES[family]
    model = make().bfloat16().train()
    fp8_state = None
    if fp8:
        how = CompileSettings(loss=False)
        fp8_state = swapped(model, Recipe(amax_history_len=4), managed=True, start_step=3, compile=how)
    else:
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for block in repeated_blocks(model, linear).values():
            block.compile()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    graphs = []
    for _ in range(2):
        for step, length in enumerate(LENGTHS):
            for _ in range(2):
                model(**batch(length)).loss.backward()
            if fp8_state is not None:
                fp8_state.update_scales()
            optimizer.step()
            optimizer.zero_grad()
            if fp8_state is not None:
                fp8_state.weights_changed()
            if step % 4 == 3:
                model.eval()
                with torch.no_grad():
                    model(**batch(length))
                model.train()
        graphs.append(counters["stats"]["unique_graphs"])
    return sum(counters["graph_break"].values()), graphs[0], graphs[1] - graphs[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_compiled_as_in_bf16(family, monkeypatch):
    compile_module = nn.Module.compile

    def traced(module: nn.Module, mode: Any = None, dynamic: Any = None) -> None:
        compile_module(module, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", traced)
    breaks, graphs, again = train(family, fp8=True)
    wanted_breaks, wanted_graphs, wanted_again = train(family, fp8=False)
    assert graphs > 0
    assert breaks <= wanted_breaks and graphs <= wanted_graphs and again <= wanted_again, (
        (breaks, graphs, again),
        (wanted_breaks, wanted_graphs, wanted_again),
    )
