"""Our own FP8 layer on the device: Transformer Engine's golden vectors, and the fast path against the reference
path.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from ds_fp8.formats import E4M3
from ds_fp8.kernels.triton import operands
from ds_fp8.layers import cuda_products
from ds_fp8.layers.layer_state import QuantizedWeight
from ds_fp8.layers.recipes import block
from ds_fp8.numerics import gemm_blocks
from ds_fp8.recipe import Recipe
from tests.layers import test_golden
from tests.layers.small_models import swapped

RECIPES = [Recipe(amax_history_len=4), Recipe(fp8_format="E4M3", margin=1, amax_history_len=4), Recipe(kind="current"),
           Recipe(kind="block"), Recipe(kind="rowwise")]  # fmt: skip


@pytest.mark.parametrize("case", test_golden.CASES, ids=test_golden.name_of)
def test_golden_vectors_on_the_device(case):
    """Scales and histories bit for bit; products within the rounding of their sums."""
    test_golden.follow(case, "cuda")


def passes(recipe: Recipe, *, fast: bool, bias: bool = True, rows: int = 256, cached: bool = True, steps: int = 4,
           spoiled: int = -1, quantized: bool = False) -> tuple[list[torch.Tensor], Any]:  # fmt: skip
    """Outputs and gradients of some steps, and the FP8 state. `spoiled`: the step whose gradient has an infinity."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024, bias=bias), nn.GELU(), nn.Linear(1024, 512, bias=bias))
    model = model.to("cuda", torch.bfloat16)
    fp8_state = swapped(model, recipe, weight_cache=cached, backend="torch")
    found = []
    for layer_state in fp8_state.layer_states:
        layer_state.fast_step = None if fast else 0
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(rows, 512, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        gradient = (torch.randn(rows, 512, generator=generator) * 1e-3).to("cuda", torch.bfloat16)
        if step == spoiled:
            gradient[3, 5] = float("inf")
        if quantized:
            for layer in (model[0], model[2]):
                data = (layer.weight.detach().float() * 100).to(torch.float8_e4m3fn)
                scales = torch.full((3,), 0.01, device="cuda")
                layer.quantized_weight = QuantizedWeight(data, scales[1])  # at an address that cuBLASLt does not take
        model.zero_grad()
        output = model(x)
        output.backward(gradient)
        found += [output.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.where(parameter.grad.isfinite(), parameter.grad, 0), alpha=-1e-2)
        fp8_state.weights_changed()
    if fast and rows % 128 == 0 and (recipe.kind != "block" or block.MULTIPLIES_BLOCKS):
        assert all(layer_state.fast_step for layer_state in fp8_state.layer_states), "the fast path was not taken"
    return found, fp8_state


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_fast_path_is_the_reference_path(recipe, cached, bias):
    """One scale per tensor: every bit. Block scales: the reference path decodes to bf16 and sums in another order;
    where that moves a 16-bit result, the next cast may take the neighbouring code, 1/16 away in e4m3 and 1/8 in
    e5m2.
    """
    ours, fp8_state = passes(recipe, fast=True, bias=bias, cached=cached)
    baseline, unfused_state = passes(recipe, fast=False, bias=bias, cached=cached)
    for number, (found, wanted) in enumerate(zip(ours, baseline, strict=True)):
        if recipe.kind == "block":
            error = (found - wanted).float().norm() / wanted.float().norm()
            assert error < 0.06, f"tensor {number}: {error}"
        else:
            assert torch.equal(found, wanted), f"tensor {number}: {(found - wanted).abs().max()}"
    if recipe.keeps_history:
        assert torch.equal(fp8_state.state_dict()["scales"], unfused_state.state_dict()["scales"])
        assert torch.equal(fp8_state.forward.history, unfused_state.forward.history)
        assert torch.equal(fp8_state.backward.history, unfused_state.backward.history)


def test_block_operands_on_the_device():
    """Both orientations of groups and tiles, every code and scale (the interpreter does not see what the compiler
    does).
    """
    for shape in ((512, 1024), (1024, 512)):
        x = torch.randn(shape).bfloat16()
        (quantized, tiles), (transposed, transposed_tiles) = operands.cast_tiles(x.cuda(), E4M3)
        wanted, wanted_tiles = gemm_blocks.quantize_128x128(x, E4M3)
        assert torch.equal(quantized.cpu().float(), wanted.float()) and torch.equal(tiles.cpu(), wanted_tiles)
        assert torch.equal(transposed.cpu().float(), wanted.t().float()) and torch.equal(
            transposed_tiles.cpu(), wanted_tiles.t()
        )
        for found, source in zip(operands.cast_groups(x.cuda(), E4M3), (x, x.t().contiguous()), strict=True):
            wanted, wanted_groups = gemm_blocks.quantize_1x128(source, E4M3)
            assert torch.equal(found[0].cpu().float(), wanted.float()) and torch.equal(found[1].cpu(), wanted_groups)


@pytest.mark.parametrize("rows", [16, 48, 24, 1])
def test_any_number_of_rows(rows):
    """Multiples of 16 take the fast path, others the reference path."""
    ours, _ = passes(RECIPES[0], fast=True, rows=rows, steps=2)
    baseline, _ = passes(RECIPES[0], fast=False, rows=rows, steps=2)
    assert all(torch.equal(found, wanted) for found, wanted in zip(ours, baseline, strict=True))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_an_overflow_is_seen_without_a_bias(recipe):
    """A cast saturates infinities; the weight's gradient says NaN in that step and is finite again in the next."""
    found, _ = passes(recipe, fast=True, bias=False, spoiled=1)
    weights = [found[step * 4 + 3] for step in range(4)]
    assert [bool(gradient.isfinite().all()) for gradient in weights] == [True, False, True, True]


def test_quantized_values_from_outside():
    """O3's quantized values, whose scale lies at any address."""
    ours, _ = passes(RECIPES[0], fast=True, quantized=True)
    baseline, _ = passes(RECIPES[0], fast=False, quantized=True)
    assert all(torch.equal(found, wanted) for found, wanted in zip(ours, baseline, strict=True))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_pass_waits_for_nothing(recipe):
    """`set_sync_debug_mode("error")` raises at any copy to the host or wait inside forward and backward."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512, bias=False)).to("cuda", torch.bfloat16)
    fp8_state = swapped(model, recipe, weight_cache=True, backend="torch")
    x = torch.randn(128, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(128, 512, device="cuda", dtype=torch.bfloat16)
    for step in range(4):
        if step == 2:  # kernels are compiled, the FP8 state has moved to the device
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).backward(gradient)
            fp8_state.weights_changed()
        finally:
            if step >= 2:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
    fast = cuda_products.takes(
        x.detach(), model[0].weight, fp8_state.call(model[0].layer_state, training=True, device=x.device)
    )
    assert fast == (recipe.kind != "block" or block.MULTIPLIES_BLOCKS)


def test_a_cuda_graph_replays_a_pass():
    """Inside one forward nothing depends on the host: the same quantized values and gradients, replayed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256)).to("cuda", torch.bfloat16)
    swapped(model, Recipe(kind="current"), weight_cache=False, backend="torch")
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        output = model(x)
        return output, torch.autograd.grad(output, model[0].weight, gradient)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = once()
    for seed in range(2):
        x.copy_(torch.randn(128, 256, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for found, wanted in zip(held, once(), strict=True):
            assert torch.equal(found, wanted)
