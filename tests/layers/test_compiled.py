"""FP8 layers under torch.compile: one whole graph, compiled once, with the eager layers' numbers.

`aot_eager` runs the graph that Inductor would get op by op, so there every number is the eager one's, bit for bit, and
a difference is a bug of the operators. What Inductor fuses is rounded less often: there losses agree, and the first
output to the rounding of bf16.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_fp8.errors import LayerError
from ds_fp8.layers import compiled
from ds_fp8.layers.layer_state import QuantizedWeight
from ds_fp8.recipe import OUR_RECIPES, HighPrecision, Recipe
from ds_fp8.zero.weights_released import Source, release
from tests.layers.small_models import swapped

COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def afresh() -> None:
    torch._dynamo.reset()
    COUNTERS.clear()


class Mlp(nn.Module):
    """Norm, SwiGLU, residual; `recomputed` puts activation checkpointing inside."""

    def __init__(self, width: int = 32, recomputed: bool = False, bias: bool = False):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=bias), nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)
        self.recomputed = recomputed

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (checkpoint(self.inner, x, use_reentrant=False) if self.recomputed else self.inner(x))


def make(recipe: Recipe, *, managed: bool = True, dtype: torch.dtype = torch.bfloat16, recomputed: bool = False,
         bias: bool = False, **fp8: Any) -> tuple[nn.Module, Any]:  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(recomputed=recomputed, bias=bias), Mlp(recomputed=recomputed, bias=bias)).to(dtype)
    return model, swapped(model, recipe, managed=managed, **fp8)


def train(model: nn.Module, fp8_state: Any, *, steps: int = 4, gas: int = 1, rows: tuple[int, ...] = (8,),
          evals: bool = False,
          dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:  # fmt: skip
    """Outputs, gradients and scales of some optimizer steps of SGD."""
    generator, found = torch.Generator().manual_seed(1), []
    for step in range(steps):
        for _ in range(gas):
            x = torch.randn(2, rows[step % len(rows)], 32, generator=generator).to(dtype).requires_grad_()
            y = model(x)
            y.float().pow(2).mean().backward()
            found += [y.detach(), x.grad]
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        if fp8_state.managed:
            fp8_state.update_scales()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
                    parameter.grad = None
        fp8_state.weights_changed()
        found.append(fp8_state.scales.clone())
        if evals:
            model.eval()
            with torch.no_grad():
                found.append(model(x.detach()))
            model.train()
    return found


def compile_blocks(model: nn.Module, **how: Any) -> None:
    for block in model:
        block.compile(**{"backend": "aot_eager", "fullgraph": True} | how)


def hold_together(recipe: Recipe, *, whole: bool = False, how: Any = None, run: Any = None, **made: Any) -> int:
    """Eager and compiled, bit for bit; returns the number of graphs that were compiled."""
    wanted = train(*make(recipe, **made), **(run or {}))
    model, fp8_state = make(recipe, **made)
    if whole:
        model.compile(**{"backend": "aot_eager", "fullgraph": True} | (how or {}))
    else:
        compile_blocks(model, **(how or {}))
    found = train(model, fp8_state, **(run or {}))
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one, other), f"tensor {number}"
    assert not COUNTERS["graph_break"]
    return COUNTERS["stats"]["unique_graphs"]


PLAIN = [Recipe(kind=kind, amax_history_len=4) for kind in OUR_RECIPES]
RECIPES = [
    *PLAIN,
    Recipe(amax_history_len=4, override_linear_precision=HighPrecision(False, False, True)),
    Recipe(amax_history_len=4, override_linear_precision=HighPrecision(True, True, False)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_equal_blocks_share_one_graph_and_keep_it(recipe):
    """20 steps, gas 2, `start_step` 3, an evaluation after each step: one graph for training, one for evaluation."""
    run = {"steps": 20, "gas": 2, "evals": True}
    assert hold_together(recipe, run=run, start_step=3, eval=True) == 2


@pytest.mark.parametrize("recipe", PLAIN, ids=str)
def test_quantized_values_are_carried_to_the_backward(recipe):
    """Without `start_step` the input is kept as one byte per element, whatever the recipe."""
    assert hold_together(recipe, bias=True) == 1
    layer_state = make(recipe)[1].layer_states[0]
    assert layer_state.carries_input


@pytest.mark.parametrize("always", [False, True])
def test_a_released_weight_is_evaluated_in_one_graph(monkeypatch, always):
    """O3; also where torch.compiler.is_exporting() is true in every traced model, as in torch 2.11."""
    if always:
        monkeypatch.setattr(torch.compiler, "is_exporting", torch.compiler.is_dynamo_compiling)
    model, _ = make(PLAIN[0])
    model.eval()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            data = (layer.weight.detach().float() * 100).to(torch.float8_e4m3fn)
            layer.quantized_weight = QuantizedWeight(data, torch.tensor(0.01))
            source = Source(f"{name}.weight", layer.quantized_weight)
            release(layer.weight, torch.bfloat16, data.device, tuple(data.shape), source)
    x = torch.randn(2, 8, 32).bfloat16()
    with torch.no_grad():
        wanted = model(x)
        compile_blocks(model)
        assert torch.equal(model(x), wanted) and not COUNTERS["graph_break"]
    assert COUNTERS["stats"]["unique_graphs"] == 1


def test_the_whole_model_is_one_graph():
    assert hold_together(RECIPES[0], whole=True) == 1


@pytest.mark.parametrize("whole", [True, False], ids=["root", "blocks"])
def test_hooks_of_a_model_without_an_engine_do_not_break_the_graph(whole):
    """There scales are renewed where a pass begins; a compiled pass begins where the eager one does."""
    assert hold_together(RECIPES[0], whole=whole, managed=False) == 1


def test_any_number_of_tokens():
    """Rows that are no multiple of anything, with `dynamic=True`: one graph."""
    run = {"rows": (8, 5, 16, 1, 33), "steps": 5}
    assert hold_together(RECIPES[0], how={"dynamic": True}, run=run) <= 2  # torch treats a size of 1 apart


def test_checkpointing_inside():
    """The recompute casts with the scales of its forward, and a maximum taken twice is the same maximum."""
    assert hold_together(RECIPES[0], recomputed=True) == 1


def test_frozen_weights_and_a_layer_in_fp32():
    """Nothing is kept, and nothing computed, for a gradient that nobody asks for."""
    results = []
    for is_compiled in (False, True):
        model, fp8_state = make(RECIPES[0], dtype=torch.float32)
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        if is_compiled:
            compile_blocks(model)
        results.append(train(model, fp8_state, dtype=torch.float32))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_autocast_decides_the_dtype():
    outputs = []
    for is_compiled in (False, True):
        model, _ = make(RECIPES[1], dtype=torch.float32)
        if is_compiled:
            compile_blocks(model)
        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
        outputs.append((y.detach(), model[1].down.weight.grad))
    assert all(torch.equal(*both) for both in zip(*outputs, strict=True))


def test_outputs_may_be_written_into():
    """Any in-place operation on what a layer returned, in a graph as beside it."""

    def pass_(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        y[:, 0] = 0
        y.mul_(2)
        y[..., :4] += 1
        return y.masked_fill_(y > 3, 3)

    model, _ = make(RECIPES[1])
    x = torch.randn(2, 8, 32).bfloat16().requires_grad_()
    found = []
    for run in (pass_, torch.compile(pass_, backend="aot_eager", fullgraph=True)):
        x.grad = None
        y = run(model[0].gate, x)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_copies_compile_by_themselves():
    """A copy has anchors, scales and graphs of its own; the original is not touched."""
    model, fp8_state = make(RECIPES[0])
    compile_blocks(model)
    train(model, fp8_state, steps=1)
    copied = copy.deepcopy(model)
    before = fp8_state.scales.clone()
    copied.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, 32).bfloat16()
    assert torch.equal(copied(x), model(x))
    layer_states = [module.layer_state for module in copied.modules() if hasattr(module, "layer_state")]
    assert not {layer_state.anchor.data_ptr() for layer_state in layer_states} & {
        layer_state.anchor.data_ptr() for layer_state in fp8_state.layer_states
    }
    assert torch.equal(fp8_state.scales, before)


def test_an_anchor_lives_as_long_as_its_layer_wherever_that_moves():
    """Else a copy of another layer's anchor could come to lie at its address, and be taken for this one's."""
    _, fp8_state = make(RECIPES[0])
    layer_state = fp8_state.layer_states[0]
    layer_state.settle(torch.device("cpu"))
    first = weakref.ref(layer_state.anchor)
    for device in ("meta", "cpu"):
        layer_state.settle(torch.device(device))
    assert first() is not None and layer_state.anchor is not first()


def test_layers_get_another_anchor_when_start_step_is_reached_and_then_keep_it():
    """A CUDA graph replays what it has recorded; another address makes torch record anew, the same one does not."""
    model, fp8_state = make(Recipe(kind="current"), start_step=3)
    x = torch.randn(2, 8, 32).bfloat16()
    seen = []  # the first step begins them
    for _ in range(5):
        model(x).sum().backward()
        seen.append([layer_state.anchor.data_ptr() for layer_state in fp8_state.layer_states])
        fp8_state.update_scales()
        fp8_state.weights_changed()
    assert seen[1] == seen[2] and seen[3] == seen[4]
    assert not set(seen[2]) & set(seen[3])


@pytest.mark.parametrize("wrong", [torch.randn(2, 31).bfloat16(), torch.randn(2, 32)], ids=["shape", "dtype"])
def test_a_wrong_input_is_an_error_that_names_the_layer(wrong):
    """Ours, not torch's of a fake tensor or of what Dynamo traces instead."""
    model, _ = make(RECIPES[0])
    layer = model[0].gate
    layer.compile(backend="aot_eager")
    layer(torch.randn(2, 32).bfloat16())
    with pytest.raises(LayerError, match=r"gate: input (has shape .*its last axis must be 32|is torch.float32)"):
        layer(wrong)


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_forward_that_dynamo_gives_up_is_the_eager_one():
    """Past its limit of recompilations Dynamo runs a forward as it is, and would trace what that calls."""
    model, _ = make(RECIPES[1])
    layer = model[0].gate
    rows = [torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (2, 3, 5, 7)]
    wanted = [layer(x) for x in rows]
    layer.compile(backend="aot_eager", dynamic=False)
    assert all(torch.equal(layer(x), expected) for x, expected in zip(rows, wanted))
    high = [torch.nn.functional.linear(x, layer.weight) for x in rows]
    assert not any(torch.equal(one, other) for one, other in zip(wanted, high))


@pytest.mark.parametrize("recipe", PLAIN, ids=str)
def test_the_fake_kernels_say_what_the_operators_return(recipe):
    """Shapes, dtypes and strides, by torch's own check, with everything carried that can be."""
    model, _ = make(recipe, bias=True)
    layer, x = model[0].gate, torch.randn(2, 3, 32).bfloat16()
    layer_state = layer.layer_state
    flags = compiled.TRAINING | compiled.GRAD | layer_state.recipe_number * compiled.RECIPE
    flags |= compiled.DGRAD | compiled.WGRAD | compiled.BGRAD
    for carried in (
        0,
        compiled.CARRIES_INPUT,
        compiled.CARRIES_INPUT | compiled.CARRIES_WEIGHT * layer_state.fp8_state.scaling.carries_weight,
    ):
        asked = flags | carried
        arguments = (x, layer.weight, layer.bias, layer_state.anchor, 64, asked)
        torch.library.opcheck(torch.ops.ds_fp8.linear_forward, arguments, test_utils="test_faketensor")
        kept = torch.ops.ds_fp8.linear_forward(*arguments)[1:]
        saved = None if carried else x
        arguments = (
            torch.randn(2, 3, 64).bfloat16(),
            saved,
            layer.weight,
            layer.bias,
            *kept,
            layer_state.anchor,
            32,
            asked,
        )
        torch.library.opcheck(torch.ops.ds_fp8.linear_backward, arguments, test_utils="test_faketensor")


@pytest.mark.slow
def test_inductor_fuses_around_the_layers():
    """What is between the layers is rounded less often than in eager mode; the losses stay together."""
    results = []
    for is_compiled in (False, True):
        model, fp8_state = make(RECIPES[0])
        if is_compiled:
            compile_blocks(model, backend="inductor")
        results.append(train(model, fp8_state, steps=6))
    first = [found[0].float() for found in results]
    assert (first[0] - first[1]).abs().max() <= first[0].abs().max() * 2**-7
    per_step = len(results[0]) // 6
    losses = [[float(found[step * per_step].float().pow(2).mean()) for step in range(6)] for found in results]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert COUNTERS["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("backend", "says"), [("aot_eager", "double backward"), ("eager", r"a second derivative.*layers/exclude")]
)
def test_a_second_derivative_is_refused(backend, says):
    """By torch, which differentiates a compiled graph itself, and once; else by the layer's name."""
    model = Mlp()
    swapped(model, Recipe())
    x = torch.randn(16, 32, requires_grad=True)
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(RuntimeError, match=f"(?s){says}"):
        gradient = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)[0]
        gradient.pow(2).sum().backward()


def test_compiled_autograd_is_no_second_derivative():
    """torch runs a captured backward with gradients on: the first derivative is the eager one's."""
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        model, x = Mlp(), torch.randn(16, 32)
        swapped(model, Recipe())
        loss = torch.compile(model, backend="eager")(x).pow(2).sum()
        enable = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
        with enable if captured else contextlib.nullcontext():
            loss.backward()
        found.append([param.grad for param in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found))
