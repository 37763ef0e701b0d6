"""Stacked experts under torch.compile: a block of a mixture is one graph, compiled once, with the eager numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_fp8.layers.experts import Fp8Experts
from ds_fp8.layers.ran import Ran
from ds_fp8.recipe import Recipe
from tests.layers.small_models import swapped
from tests.layers.test_experts import experts_of, mixture

COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def afresh() -> None:
    torch._dynamo.reset()
    COUNTERS.clear()


def run(block: nn.Module, tokens: int, *, training: bool = True) -> list[torch.Tensor]:
    """Output, and gradients of the input and of the block's parameters."""
    block.train(training).zero_grad()
    x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(tokens)).requires_grad_()
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), [("Mixtral", "current"), ("Qwen3Moe", "block"), ("GptOss", "delayed")])
def test_a_block_is_one_graph_with_the_eager_numbers(name, recipe):
    """Router, experts and sum: fullgraph, other numbers of tokens and evaluation included; FP8 in both directions."""
    model = mixture(name)
    swapped(model, Recipe(kind=recipe, fp8_format="E4M3"))
    block = model.model.layers[1].mlp
    eager = copy.deepcopy(block)
    state = next(module for module in block.modules() if isinstance(module, Fp8Experts))._ds_fp8_experts
    state.ran = Ran()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (24, 40, 17):
        for one, other in zip(run(compiled, tokens), run(eager, tokens), strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
    assert state.ran.fprop and state.ran.dgrad and state.ran.wgrad, "and not in high precision"
    assert COUNTERS["stats"]["unique_graphs"] <= 2, "not compiled anew for other numbers of tokens"
    assert not COUNTERS["graph_break"]


@pytest.mark.slow
def test_start_step_and_quantized_values_from_outside_compile_nothing_anew():
    model = mixture("Mixtral")
    fp8_state = swapped(model, Recipe(kind="current"), start_step=1, managed=True)
    (module,) = list(experts_of(model).values())[:1]
    args = torch.randn(40, 64), torch.rand(40, 4).topk(2).indices, torch.full((40, 2), 0.5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    high = compiled(*args)
    assert torch.allclose(high, module(*args), atol=1e-6)
    graphs = COUNTERS["stats"]["unique_graphs"]
    fp8_state.weights_replaced(1)
    low = compiled(*args)
    assert torch.allclose(low, module(*args), atol=1e-6) and 1e-3 < (low - high).norm() / high.norm() < 0.1
    assert COUNTERS["stats"]["unique_graphs"] == graphs
