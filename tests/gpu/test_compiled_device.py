"""Compiled FP8 layers on a GPU: the same numbers as eager, and CUDA graphs that follow the scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_fp8.recipe import OUR_RECIPES, Recipe
from tests.layers.small_models import swapped

pytestmark = pytest.mark.gpu

WIDTH = 512


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def train(recipe: Recipe, how: dict[str, Any] | None, *, steps: int = 8, gas: int = 2, rows: int = 128,
          managed: bool = True,
          **fp8: Any) -> tuple[list[torch.Tensor], Any]:  # fmt: skip
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = nn.Sequential(Mlp(), Mlp()).bfloat16()
    fp8_state = swapped(model, recipe, managed=managed, backend="torch", **fp8)
    fp8_state.to(torch.device("cuda", 0))
    if how is not None:
        for block in model:
            block.compile(fullgraph=True, **how)
    for parameter in model.parameters():  # a graph's own gradient lives until its next replay only
        parameter.grad = torch.zeros_like(parameter)
    generator, found = torch.Generator("cuda").manual_seed(1), []
    for _ in range(steps):
        for _ in range(gas):
            x = torch.randn(2, rows, WIDTH, generator=generator, device="cuda").bfloat16().requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            y = model(x)
            y.float().pow(2).mean().backward()
            found.append(y.detach().clone())
        found += [parameter.grad.clone() for parameter in model.parameters()]
        if managed:
            fp8_state.update_scales()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad.zero_()
        fp8_state.weights_changed()
        found.append(fp8_state.scales.clone())
    return found, fp8_state


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one, other), f"tensor {number}: {(one.float() - other.float()).abs().max()}"


RECIPES = [Recipe(kind=kind, amax_history_len=4) for kind in OUR_RECIPES]


@pytest.mark.parametrize("rows", [128, 9], ids=["fast", "padded"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_compiled_is_eager(recipe, rows):
    wanted, _ = train(recipe, None, rows=rows, start_step=2)
    found, _ = train(recipe, {"backend": "aot_eager"}, rows=rows, start_step=2)
    assert_equal(found, wanted)
    wanted, _ = train(recipe, None, rows=rows)
    found, _ = train(recipe, {"backend": "aot_eager"}, rows=rows)
    assert_equal(found, wanted)


@pytest.mark.parametrize("start_step", [0, 3])
@pytest.mark.parametrize("recipe", RECIPES[:2], ids=str)
def test_a_cuda_graph_follows_scales_weights_and_start_step(recipe, start_step):
    """Replayed kernels read scales at fixed places and cast the weight anew: the numbers of the same graph without
    replay.
    """
    wanted, _ = train(recipe, {}, start_step=start_step)
    found, _ = train(recipe, {"mode": "reduce-overhead"}, start_step=start_step)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_equal(found, wanted)


def test_a_cuda_graph_without_an_engine_is_refused():
    with pytest.raises(Exception, match="no DeepSpeed engine steps"):
        train(RECIPES[0], {"mode": "reduce-overhead"}, managed=False)
