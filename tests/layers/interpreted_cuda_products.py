"""The GPU's fast path on a CPU: its kernels in Triton's interpreter, its products by `gemm.matmul`, against the
reference path.

So the code around kernels and products (scales, recording, caches, axes, autograd) is held to the reference path bit
for bit where no GPU is; what the compiler makes of the kernels, and cuBLASLt's products, are for `tests/gpu`. Triton
reads TRITON_INTERPRET when it is imported, so `test_cuda_products.py` runs this file in a process of its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from ds_fp8.kernels.triton import entry, launch, operands, pairs, weights
from ds_fp8.layers import compiled, compiled_products, cuda_products, fp8_linear
from ds_fp8.layers.gemm import matmul
from ds_fp8.layers.layer_state import QuantizedWeight
from ds_fp8.layers.operands import GROUPS, ROWS, TENSOR, TILES, Operand
from ds_fp8.layers.recipes import delayed
from ds_fp8.recipe import Recipe
from tests.layers.small_models import swapped

assert launch.INTERPRETED, "run this file with TRITON_INTERPRET=1"

RECIPES = [Recipe(amax_history_len=3), Recipe(fp8_format="E4M3", margin=1, amax_history_len=3), Recipe(kind="current"),
           Recipe(kind="block"), Recipe(kind="rowwise")]  # fmt: skip
WIDTH, HIDDEN = 128, 128
RUNS = {"recipe": ""}
"""Of which recipe a pass runs: operands of 128 columns have one scale per row under `block` too."""
operands.PARTS = 4  # the interpreter runs programs one after the other


def scaled_mm(a: torch.Tensor, b: torch.Tensor, *, scale_a: torch.Tensor, scale_b: torch.Tensor,
              bias: torch.Tensor | None = None, out_dtype: torch.dtype,
              use_fast_accum: bool = False) -> torch.Tensor:  # fmt: skip
    """`torch._scaled_mm` for any device; it refuses the layouts that cuBLASLt refuses."""
    assert a.is_contiguous() and b.t().is_contiguous()
    operands = []
    for quantized, scale_inv in ((a, scale_a), (b.t(), scale_b.t() if scale_b.dim() == 2 else scale_b)):
        extent = TENSOR if scale_inv.dim() < 2 else GROUPS if scale_inv.shape[0] == quantized.shape[0] else TILES
        if extent == GROUPS and RUNS["recipe"] == "rowwise":
            extent, scale_inv = ROWS, scale_inv.view(-1)
        assert extent != TENSOR or scale_inv.data_ptr() % 16 == 0
        operands.append(
            Operand(quantized, scale_inv.reshape(()) if extent == TENSOR else scale_inv.contiguous(), extent)
        )
    return matmul(*operands, out_dtype, bias=bias)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # each test has its own limit of recompilations
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(cuda_products, "library_for", lambda device: entry)
    for module in (fp8_linear, compiled_products):
        monkeypatch.setattr(module, "takes", takes)
    for module in (compiled, compiled_products):
        monkeypatch.setattr(module, "multiplies_transposed", lambda x: True)


def takes(x: torch.Tensor, weight: torch.Tensor, call: Any) -> bool:
    """Whoever set `fast_step` takes the fast path."""
    assert x.is_contiguous()
    rows = x.numel() // x.shape[-1]
    return (
        bool(call.layer_state.fast_step)
        and not call.warming
        and rows % call.layer_state.fast_step == 0
        and call.knows_operands()
    )


def passes(recipe: Recipe, *, fast: bool, graph: bool = False, bias: bool = True, cached: bool = True,
           spoiled: int = -1, quantized: bool = False, shape: tuple[int, ...] = (2, 64), micro_batches: int = 1,
           managed: bool = False, sharded: bool = False,
           enlarged: bool = False) -> tuple[list[torch.Tensor], Any]:  # fmt: skip
    """Outputs and gradients of some steps, each after an evaluation, and the FP8 state."""
    torch.manual_seed(0)
    RUNS["recipe"] = recipe.kind
    model = nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias=bias), nn.GELU(), nn.Linear(HIDDEN, WIDTH, bias=bias)
    ).bfloat16()
    fp8_state = swapped(model, recipe, managed=managed, weight_cache=cached, backend="torch", eval=True)
    fp8_state.optimized = frozenset(map(id, model.parameters()))
    fp8_state.tensors.kernels = entry if fast else None
    if sharded:  # as ZeRO-3 marks them
        for number, layer in enumerate((model[0], model[2])):
            layer.weight.ds_id, layer.weight.ds_shape = number, layer.weight.shape
    if graph:
        model.compile(backend="aot_eager", fullgraph=True)
    for layer_state in fp8_state.layer_states:
        layer_state.fast_step = 16 if fast else 0
    found = []
    for step in range(3):
        if quantized:
            for layer in (model[0], model[2]):
                scales = torch.full((3,), 0.01)
                data = (layer.weight.detach().float() * 100).to(torch.float8_e4m3fn)
                layer.quantized_weight = QuantizedWeight(data, scales[1])  # at an address that cuBLASLt does not take
        model.zero_grad()
        generator = torch.Generator().manual_seed(step)
        for _ in range(micro_batches):
            if enlarged:
                model[0].weight.data.mul_(16)
            x = torch.randn(*shape, WIDTH, generator=generator).bfloat16().requires_grad_()
            gradient = (torch.randn(*shape, WIDTH, generator=generator) * 1e-3).bfloat16()
            if step == spoiled:
                gradient.view(-1, WIDTH)[3, 5] = float("inf")
            model.eval()
            with torch.no_grad():
                found.append(model(x))
            model.train()
            output = model(x)
            output.backward(gradient)
            found += [output.detach(), x.grad]
        found += [parameter.grad.clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.where(parameter.grad.isfinite(), parameter.grad, 0), alpha=-1.0)
        if managed:
            fp8_state.update_scales()
        fp8_state.weights_changed()
    return found, fp8_state


def hold_together(recipe: Recipe, **how: Any) -> list[torch.Tensor]:
    """The two paths: every bit of outputs, gradients, scales and histories. NaN equals NaN."""
    ours, fp8_state = passes(recipe, fast=True, **how)
    baseline, unfused_state = passes(recipe, fast=False, **{**how, "graph": False})
    for number, (found, wanted) in enumerate(zip(ours, baseline, strict=True)):
        assert found.shape == wanted.shape, f"tensor {number}"
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0)), f"tensor {number}"
    states = fp8_state.state_dict(), unfused_state.state_dict()
    for name in ("scales", "forward_history", "backward_history"):
        assert torch.equal(states[0][name], states[1][name]), name
    assert states[0]["forward_folds"] == states[1]["forward_folds"]
    assert states[0]["backward_folds"] == states[1]["backward_folds"]
    return ours


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_fast_path_is_the_reference_path(recipe):
    hold_together(recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_fast_path_in_a_compiled_graph(recipe):
    """Quantized values and scales travel from forward to backward in fixed forms; the products make the same of
    them.
    """
    hold_together(recipe, graph=True)


@pytest.mark.parametrize("recipe", RECIPES[1:3], ids=str)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
def test_over_micro_batches(recipe, cached):
    """A quantized weight serve all of them, and after an evaluation they lack nothing for the backward."""
    hold_together(recipe, cached=cached, micro_batches=2, shape=(48,))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
def test_under_an_engine_where_the_first_step_measures_each_tensor(cached):
    """Tensors without history are cast with their own amax; gradients too, which come after a forward on the fast
    path.
    """
    hold_together(RECIPES[0], managed=True, cached=cached, micro_batches=2)
    hold_together(RECIPES[1], managed=True, cached=cached, spoiled=0, bias=False)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_weight_that_a_script_makes_sixteen_times_as_large(sharded):
    """Through `.data`, which leaves no trace on the host: cast by its own scale in forward, evaluation, backward."""
    found = hold_together(RECIPES[0], managed=True, cached=False, enlarged=True, sharded=sharded)
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_sharded_weight(recipe):
    """Cast in the forward as it lies, and in the backward, where ZeRO-3 has gathered it again, transposed: the same
    quantized values.
    """
    hold_together(recipe, sharded=True, micro_batches=2)


def test_sharded_weights_cost_one_launch_per_operand(monkeypatch):
    """Or less. Forward: input and weight, together. Backward: grad_output, and the weight for dgrad. Recompute makes
    the forward's again.
    """
    launches = []
    kinds = ((operands, "cast_delayed"), (operands, "cast_current"), (weights, "cast_weight"), (pairs, "cast_delayed"))
    for module, name in kinds:
        cast = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, cast=cast, **k: launches.append(cast) or cast(*a, **k))
    transposed = []

    def dense(quantized, make=cuda_products.dense):
        if not quantized.is_contiguous():  # else nothing is copied
            transposed.append(1)
        return make(quantized)

    monkeypatch.setattr(cuda_products, "dense", dense)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False)).bfloat16()
    fp8_state = swapped(model, RECIPES[0], managed=True, backend="torch")
    fp8_state.tensors.kernels, fp8_state.layer_states[0].fast_step = entry, 16
    layer = model[0]
    layer.weight.ds_id, layer.weight.ds_shape = 0, layer.weight.shape
    counts = []
    for quantized in (False, True):
        for _step in range(3):
            if quantized:
                data = (layer.weight.detach().float() * 100).to(torch.float8_e4m3fn)
                layer.quantized_weight = QuantizedWeight(data, torch.full((), 0.01))
            x = torch.randn(32, WIDTH).bfloat16().requires_grad_()
            launches.clear(), transposed.clear()
            output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            forward = len(launches)
            output.backward(torch.full_like(output, 1e-3))
            counts.append((forward, len(launches) - forward, len(transposed)))
            fp8_state.update_scales()
            fp8_state.weights_changed()
    # With histories: one launch forward, one in the recompute, grad_output and the transposed weight in the backward.
    assert counts[1:3] == [(1, 3, 0)] * 2
    # Quantized values from outside: the weight is not cast at all, its quantized values are transposed once.
    assert counts[4:6] == [(1, 2, 1)] * 2


def test_quantized_values_from_outside():
    """O3's quantized values, whose scale lies at any address."""
    hold_together(RECIPES[0], quantized=True)


@pytest.mark.parametrize("quantized", [False, True], ids=["cast now", "from outside"])
def test_hooks_on_saved_tensors_get_no_weight_that_may_be_released(quantized):
    """Where its quantized values come from outside (O3) the 16-bit weight may be away; a hook that copies reads it."""
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False)).bfloat16()
    fp8_state = swapped(model, RECIPES[0], managed=True, backend="torch")
    fp8_state.tensors.kernels, fp8_state.layer_states[0].fast_step = entry, 16
    layer = model[0]
    layer.weight.ds_id, layer.weight.ds_shape = 0, layer.weight.shape  # as in ZeRO 3
    memory, x = layer.weight.untyped_storage()._cdata, torch.randn(32, WIDTH).bfloat16()
    for _step in range(3):
        if quantized:
            data = (layer.weight.detach().float() * 100).to(torch.float8_e4m3fn)
            layer.quantized_weight = QuantizedWeight(data, torch.full((), 0.01))
        packed, gradients = [], []
        for hooks in (torch.autograd.graph.saved_tensors_hooks(packed_into(packed), torch.clone), nullcontext()):
            operand = x.clone().requires_grad_()
            with hooks:
                output = model(operand)
            output.backward(torch.full_like(output, 1e-3))
            gradients.append(operand.grad)
        assert packed and torch.equal(*gradients)
        assert any(kept.untyped_storage()._cdata == memory for kept in packed) is not quantized
        fp8_state.update_scales()
        fp8_state.weights_changed()


def packed_into(found: list[torch.Tensor]) -> Any:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor.clone()

    return pack


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_an_overflow_is_seen_without_a_bias(recipe):
    """A cast saturates infinities; the weight's gradient says NaN in that step, on both paths."""
    found = hold_together(recipe, bias=False, spoiled=1)
    weights = [found[step * 5 + 4] for step in range(3)]
    assert [bool(gradient.isfinite().all()) for gradient in weights] == [True, False, True]


def test_the_cast_of_a_known_gradient_shows_an_overflow_itself(monkeypatch):
    """Delayed scaling, in a graph and eager: no launch beside the cast, once tensors have histories."""
    beside = []
    show = delayed.with_overflow_shown
    monkeypatch.setattr(delayed, "with_overflow_shown", lambda *given: beside.append(1) or show(*given))
    for graph in (False, True):
        beside.clear()
        passes(RECIPES[0], fast=True, managed=True, bias=False, graph=graph)
        assert not beside
        found, _ = passes(RECIPES[0], fast=True, managed=True, bias=False, graph=graph, spoiled=1, micro_batches=2)
        gradients = [found[step * 8 + 6 :][:2] for step in range(3)]
        finite = [bool(one.isfinite().all()) for pair in gradients for one in pair]
        assert finite == [True, True, True, False, True, True]  # dgrad saturates


def test_an_output_may_be_written_into():
    """`x += residual` after a layer, as models do: what the function returns is no view that was made without
    autograd.
    """
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).bfloat16()
    fp8_state = swapped(model, RECIPES[2], backend="torch")
    fp8_state.layer_states[0].fast_step = 16
    x = torch.randn(2, 16, WIDTH).bfloat16().requires_grad_()
    output = model(x)
    output += x
    output.sum().backward()
    assert x.grad.isfinite().all()
