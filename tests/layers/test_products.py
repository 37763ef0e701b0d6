"""The three products: what is cast, what stays in high precision, and every shape and dtype that nn.Linear takes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from ds_fp8.errors import BackendError
from ds_fp8.formats import E4M3, E5M2
from ds_fp8.kernels import dequantize, quantize
from ds_fp8.layers import Fp8Linear, operands
from ds_fp8.recipe import OUR_RECIPES, HighPrecision, Recipe
from tests.layers.small_models import swapped

KINDS = OUR_RECIPES
RECIPES = [Recipe(kind=kind, fp8_format=fmt, amax_history_len=4) for kind in KINDS for fmt in ("HYBRID", "E4M3")]
STEP = E4M3.half_ulp + E5M2.half_ulp
"""Relative error of one product of an e4m3 and an e5m2 element: the sum of both casts."""


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


def pair(recipe: Recipe, dtype: torch.dtype = torch.float32, bias: bool = True, **fp8) -> tuple:
    """(model with one Fp8Linear, its FP8 state, the unmodified model)."""
    torch.manual_seed(0)
    baseline = nn.Sequential(nn.Linear(64, 48, bias=bias)).to(dtype)
    model = copy.deepcopy(baseline)
    return model, swapped(model, recipe, **fp8), baseline


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_near_high_precision(recipe, dtype):
    """Each operand is off by at most half an ulp of its format, so a product is off by less than the sum of both."""
    model, fp8_state, baseline = pair(recipe, dtype)
    for _ in range(3):  # delayed scaling has met the tensors by then
        x = torch.randn(4, 8, 64, dtype=dtype, requires_grad=True)
        copied = x.detach().clone().requires_grad_()
        model.zero_grad(), baseline.zero_grad()
        y, exact = model(x), baseline(copied)
        grad = torch.randn_like(y)
        y.backward(grad), exact.backward(grad)
        fp8_state.weights_changed()
    assert y.dtype == dtype and x.grad.dtype == dtype and model[0].weight.grad.dtype == dtype
    assert relative(y, exact) < 2 * E4M3.half_ulp
    assert relative(x.grad, copied.grad) < STEP
    assert relative(model[0].weight.grad, baseline[0].weight.grad) < STEP
    assert relative(model[0].bias.grad, baseline[0].bias.grad) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("high", itertools.product([False, True], repeat=3), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_override_keeps_exactly_the_named_products(kind, high):
    """A product in high precision equals nn.Linear's; one in FP8 does not."""
    model, _, baseline = pair(Recipe(kind=kind, override_linear_precision=HighPrecision(*high)))
    x = torch.randn(32, 64, requires_grad=True)
    copied = x.detach().clone().requires_grad_()
    y, exact = model(x), baseline(copied)
    grad = torch.randn_like(y)
    y.backward(grad), exact.backward(grad)
    found = (y, x.grad, model[0].weight.grad)
    wanted = (exact, copied.grad, baseline[0].weight.grad)
    for name, is_high, ours, theirs in zip(HighPrecision._fields, high, found, wanted, strict=True):
        assert (relative(ours, theirs) < 1e-6) == is_high, name


def test_current_scaling_is_exact_in_its_operands():
    """The product of the quantized values in float64, times both scale_inv, is what comes out, up to fp32 rounding."""
    model, _, baseline = pair(Recipe(kind="current"), bias=False)
    x = torch.randn(32, 64)
    scale_x, scale_w = 448 / x.abs().max(), 448 / baseline[0].weight.abs().max()
    quantized_x, quantized_w = quantize(x, scale_x, E4M3), quantize(baseline[0].weight.detach(), scale_w, E4M3)
    left, right = dequantize(quantized_x, 1.0).double(), dequantize(quantized_w, 1.0).double()
    exact = left @ right.t() / scale_x.double() / scale_w.double()
    assert relative(model(x), exact) < 2.0**-22


def test_rowwise_scaling_is_exact_in_its_operands():
    """Each operand has a scale for each row along the summed axis, another one in each product; float64 gives the
    same.
    """
    model, _, baseline = pair(Recipe(kind="rowwise", fp8_format="E4M3"), bias=False)
    x = (torch.randn(32, 64) * torch.logspace(-6, 0, 32).unsqueeze(1)).requires_grad_()
    grad = torch.randn(32, 48) * torch.logspace(0, -6, 48)
    y = model(x)
    y.backward(grad)

    def rows(operand: torch.Tensor) -> torch.Tensor:
        scale = 448 / operand.detach().abs().amax(1, keepdim=True)
        quantized = quantize((operand.detach() * scale).contiguous(), 1.0, E4M3)
        return dequantize(quantized, 1.0).double() / scale.double()

    weight = baseline[0].weight
    assert relative(y, rows(x) @ rows(weight).t()) < 2.0**-21
    assert relative(x.grad, rows(grad) @ rows(weight.t()).t()) < 2.0**-21
    assert relative(model[0].weight.grad, rows(grad.t()) @ rows(x.t()).t()) < 2.0**-21
    each = (y.detach() - baseline(x).detach()).norm(dim=1) / baseline(x).detach().norm(dim=1)
    assert each.max() < 2 * E4M3.half_ulp, "a small token is as exact as a large one"


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (5, 64), (2, 3, 64), (2, 0, 64), (2, 1, 3, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_of_nn_linear(kind, shape):
    model, _, baseline = pair(Recipe(kind=kind))
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    assert y.shape == baseline(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape and model[0].weight.grad.shape == (48, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_does_not_matter(kind):
    """Transposed, sliced and expanded inputs and gradients give the same bits as dense ones."""
    found = []
    for dense in (True, False):
        model, _, _ = pair(Recipe(kind=kind), weight_cache=False)
        torch.manual_seed(1)
        x = torch.randn(64, 32).t()
        grad = torch.randn(48, 1).expand(48, 32).t()
        x, grad = (x.contiguous(), grad.contiguous()) if dense else (x, grad)
        x = x.detach().requires_grad_()
        y = model(x)
        y.backward(grad)
        found.append((y, x.grad, model[0].weight.grad))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs", itertools.product([False, True], repeat=3), ids=str)
def test_gradients_only_where_asked(kind, needs):
    """Frozen weight: no wgrad; an input without gradient: no dgrad; the others are not disturbed."""
    model, _, _ = pair(Recipe(kind=kind))
    needs_input, needs_weight, needs_bias = needs
    x = torch.randn(16, 64, requires_grad=needs_input)
    model[0].weight.requires_grad_(needs_weight)
    model[0].bias.requires_grad_(needs_bias)
    y = model(x)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    assert (x.grad is not None) == needs_input
    assert (model[0].weight.grad is not None) == needs_weight
    assert (model[0].bias.grad is not None) == needs_bias


def test_the_backward_keeps_one_byte_per_element_of_the_input():
    """What autograd holds of a bf16 input is its quantized values."""
    model, _, _ = pair(Recipe(kind="delayed"), torch.bfloat16)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        model(torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True))
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 32 * 64 + 48 * 64 + 2 * 4


def test_an_emulated_backward_decodes_each_operand_once(monkeypatch):
    """grad_output serves dgrad and wgrad with one decode; weight and input make three."""
    decoded = []

    def counting(quantized, *rest):
        decoded.append(quantized.dtype)
        return dequantize(quantized, *rest)

    model, *_ = pair(Recipe(amax_history_len=4), torch.bfloat16)
    loss = model(torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)).float().square().sum()
    monkeypatch.setattr(operands, "dequantize", counting)
    loss.backward()
    assert sorted(map(str, decoded)) == ["torch.float8_e4m3fn", "torch.float8_e4m3fn", "torch.float8_e5m2"]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_casts_like_nn_linear(kind):
    """fp32 parameters under autocast: bf16 products and output, fp32 gradients of parameters and input."""
    model, _, baseline = pair(Recipe(kind=kind))
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, exact = model(x), baseline(x)
        assert y.dtype == exact.dtype == torch.bfloat16
        y.float().sum().backward()  # inside autocast, which must not reach the backward's own products
    assert x.grad.dtype == model[0].weight.grad.dtype == torch.float32
    assert relative(y, exact) < 2 * E4M3.half_ulp if kind != "delayed" else y.isfinite().all()


def test_mixed_dtypes_are_refused_by_name():
    model, _, _ = pair(Recipe())
    with pytest.raises(BackendError, match=r"0: input is torch.bfloat16, weight is torch.float32"):
        model(torch.randn(2, 64, dtype=torch.bfloat16))


def test_a_wrong_shape_is_refused_by_name():
    model, _, _ = pair(Recipe())
    with pytest.raises(BackendError, match=r"0: input has shape \(2, 63\), its last axis must be 64"):
        model(torch.randn(2, 63))


def test_a_second_derivative_is_refused():
    """FP8 casts have no derivative of their own: a silent zero would be wrong."""
    model, _, _ = pair(Recipe())
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(BackendError, match="second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("trained", ["weight and bias", "weight", "nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_gradients_reach_the_overflow_check(kind, trained, bad):
    """FP8 saturates an infinity, so something that stays in high precision, or NaN, must show it to the loss scaler."""
    model, fp8_state, _ = pair(Recipe(kind=kind), bias=trained == "weight and bias")
    model[0].weight.requires_grad_(trained != "nothing")
    x = torch.randn(16, 64, requires_grad=True)
    y = model(x)
    grad = torch.ones_like(y)
    grad[3, 5] = bad
    y.backward(grad)
    shown = [tensor.grad for tensor in (x, *model.parameters()) if tensor.grad is not None]
    assert not all(tensor.isfinite().all() for tensor in shown)
    fp8_state.update_scales()
    assert fp8_state.scales.isfinite().all()


def test_extra_repr_shows_the_numerics():
    model, _, _ = pair(Recipe())
    assert "delayed, e4m3 x e4m3, e5m2 x e4m3" in repr(model[0])
    assert isinstance(model[0], nn.Linear) and isinstance(model[0], Fp8Linear)
