"""Small models and settings that the tests of plan and layers share."""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_fp8.config.settings import DeepSpeedFacts, Fp8Settings, LayerSettings, MsampSettings, Settings
from ds_fp8.layers import ModelFp8State, swap_layers
from ds_fp8.levels import LEVELS
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe

TESTS = Path(__file__).parents[1]


def settings(
    recipe: Recipe | None = None, *, layers: LayerSettings | None = None, level: str | None = None, **fp8: Any
) -> Settings:
    """`fp8` on with a short history, and `msamp` at `level` on ZeRO-2 if one is given."""
    msamp = MsampSettings(enabled=True, level=LEVELS[level]) if level else MsampSettings()
    facts = DeepSpeedFacts(zero_stage=2, base_dtype="bf16") if level else DeepSpeedFacts()
    return Settings(
        Fp8Settings(True, recipe=recipe or Recipe(amax_history_len=4), layers=layers or LayerSettings(), **fp8),
        msamp,
        facts,
    )


def swapped(model: nn.Module, recipe: Recipe | None = None, *, managed: bool = False, **fp8: Any) -> ModelFp8State:
    """Swap `model` by a plan of its own."""
    return swap_layers(model, make_plan(model, settings(recipe, **fp8)), managed=managed)


def managed_by(engine: Any, fp8_state: ModelFp8State) -> None:
    """What the engine hook does with the FP8 state at each optimizer step."""
    take_step = engine._take_model_step

    def step(*args: Any, **kwargs: Any) -> None:
        fp8_state.update_scales()
        take_step(*args, **kwargs)
        fp8_state.weights_changed()

    engine._take_model_step = step
    fp8_state.to(engine.device)
    fp8_state.optimized = frozenset(map(id, engine.module.parameters()))


def columns(fp8_state: ModelFp8State, fqn: str) -> dict[str, torch.Tensor]:
    """Scales and histories of one layer after everything recorded was taken up."""
    fp8_state.update_scales()
    layer_state = fp8_state.layer_state(fqn)
    split = 2 * len(fp8_state.names)
    forward = [layer_state.input_column, layer_state.weight_column]
    return {
        "forward_scale": fp8_state.scales[forward],
        "forward_history": fp8_state.forward.history[:, forward],
        "backward_scale": fp8_state.scales[layer_state.grad_output_column],
        "backward_history": fp8_state.backward.history[:, layer_state.grad_output_column - split],
    }


def golden(path: str) -> Any:
    """A golden file below tests/."""
    return torch.load(io.BytesIO(lzma.open(TESTS / path).read()), weights_only=True)


class Block(nn.Module):
    """A residual block of two linear layers around a GELU, as in a transformer's MLP."""

    def __init__(self, width: int = 32, hidden: int = 48):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class TinyModel(nn.Module):
    """Embedding, blocks, and a head tied to the embedding."""

    def __init__(self, blocks: int = 2, width: int = 32, words: int = 64, tied: bool = True):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
