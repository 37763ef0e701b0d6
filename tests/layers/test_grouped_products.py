"""Stacked experts in FP8: the reference against fp32, the odd counts, and what each operand's scale is."""

from __future__ import annotations

import pytest
import torch

from ds_fp8.formats import E4M3
from ds_fp8.layers.grouped_products import GroupedProducts
from ds_fp8.layers.groups import Groups, Layout
from ds_fp8.numerics.row_scales import column_amaxes, quantize_columns, quantize_rows
from ds_fp8.recipe import HighPrecision, Recipe

RECIPES = {
    "current": Recipe(kind="current"),
    "delayed": Recipe(),
    "block": Recipe(kind="block", fp8_format="E4M3"),
    "high": Recipe(override_linear_precision=HighPrecision(True, True, True)),
    "some": Recipe(kind="current", override_linear_precision=HighPrecision(False, True, False)),
}
ERROR = {"current": 0.04, "delayed": 0.04, "block": 0.04, "high": 1e-6, "some": 0.04}
"""Relative error of a product of two e4m3 operands: 2^-4 for each element at most, a quarter of that in the mean square
(both operands together 0.036 for normal values)."""

COUNTS = {
    "even": [16, 16, 16],
    "uneven": [3, 1, 140],
    "an empty one": [0, 20, 7],
    "all to one": [0, 0, 33],
    "one token": [0, 1, 0],
    "none": [0, 0, 0],
    "rows of nobody": [5, 0, 9],
}


def run(recipe, counts, transposed=False, extra=0, dtype=torch.float32):
    """(output, grad_input, grad_weight) in FP8 and in fp32."""
    torch.manual_seed(1)
    rows, experts = sum(counts) + extra, len(counts)
    x, weight = torch.randn(rows, 32), torch.randn(experts, 48, 32)
    gradient = torch.randn(rows, 48)
    found = []
    groups = Groups(torch.tensor(counts), rows)
    for fp8 in (True, False):
        a = x.to(dtype if fp8 else torch.float32, copy=True).requires_grad_()
        w = (weight.transpose(1, 2).contiguous() if transposed else weight.clone()).requires_grad_()
        if fp8:
            out = GroupedProducts.apply(a, w, groups, recipe, Layout(transposed), True)
        else:
            stack = w.transpose(1, 2) if transposed else w
            parts = [a[first:last] @ stack[e].t() for e, (first, last) in enumerate(groups.bounds)]
            out = torch.cat([*parts, a[sum(counts) :] @ stack[0].t() * 0])
        out.backward(gradient.to(out.dtype))
        found.append((out.detach().float(), a.grad.float().clone(), w.grad.float().clone()))
    return found


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm()) if exact.norm() else float(ours.norm())


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_three_products_are_within_the_formats_error_of_fp32(recipe, counts):
    extra = 6 if counts == "rows of nobody" else 0
    ours, exact = run(RECIPES[recipe], COUNTS[counts], extra=extra)
    for one, other in zip(ours, exact, strict=True):
        assert one.shape == other.shape and error(one, other) <= ERROR[recipe]
    assert error(ours[0], exact[0]) > 1e-4 or recipe in ("high",) or counts == "none", "it did round to FP8"


@pytest.mark.parametrize("recipe", ["current", "block", "high"])
def test_weights_that_lie_as_in_out_give_the_same_numbers(recipe):
    """gpt-oss keeps [experts, in, out]: the same quantized values; the gradient is made as the weight lies, so its sums
    and
    scales come in another order."""
    straight, transposed = run(RECIPES[recipe], [3, 0, 40])[0], run(RECIPES[recipe], [3, 0, 40], transposed=True)[0]
    assert torch.equal(straight[0], transposed[0]) and torch.equal(straight[1], transposed[1])
    assert error(straight[2], transposed[2].transpose(1, 2)) < 1e-6


def test_one_expert_is_one_linear_layer():
    """Beside the products written out: quantized values by rows, fp32 sum, both scales."""
    ours = run(RECIPES["current"], [37])[0]
    torch.manual_seed(1)
    x, weight, gradient = torch.randn(37, 32), torch.randn(1, 48, 32)[0], torch.randn(37, 48)

    def product(a, b):
        (ca, sa), (cb, sb) = quantize_rows(a, E4M3), quantize_rows(b, E4M3)
        return (ca.float() @ cb.float().t()) * sa[:, None] * sb

    assert torch.equal(ours[0], product(x, weight))
    assert torch.equal(ours[1], product(gradient, weight.t()))
    assert torch.equal(ours[2][0], product(gradient.t(), x.t()))


def test_no_token_sees_its_neighbours():
    """A row a thousand times larger changes no other row's output, and no other expert's gradient."""
    recipe = RECIPES["current"]
    torch.manual_seed(0)
    x, weight = torch.randn(10, 32), torch.randn(2, 48, 32)
    groups = Groups(torch.tensor([4, 6]), 10)
    loud = x.clone()
    loud[0] *= 1000
    quiet_out, loud_out = (
        GroupedProducts.apply(one, weight, groups, recipe, Layout(), False) for one in (x, loud)
    )  # fmt: skip
    assert torch.equal(quiet_out[1:], loud_out[1:]) and not torch.equal(quiet_out[0], loud_out[0])


@pytest.mark.parametrize("recipe", ["current", "block"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_in_a_gradient_is_seen_in_both_products(recipe, value):
    x, weight = torch.randn(8, 32).requires_grad_(), torch.randn(2, 32, 32).requires_grad_()
    out = GroupedProducts.apply(x, weight, Groups(torch.tensor([3, 5]), 8), RECIPES[recipe], Layout(), True)
    gradient = torch.randn_like(out)
    gradient[1, 5] = value
    out.backward(gradient)
    assert not x.grad[1].isfinite().all() and not weight.grad[0].isfinite().all()
    assert x.grad[4:].isfinite().all() and weight.grad[1].isfinite().all()


def test_bf16_in_bf16_out():
    ours, exact = run(RECIPES["current"], [5, 7], dtype=torch.bfloat16)
    assert all(error(one, other) < 0.05 for one, other in zip(ours, exact, strict=True))


def test_columns_by_expert():
    """One scale for each column of each expert, from a multiple of 16 on; an expert without rows has scale 1."""
    x = torch.tensor([[1.0, 8.0], [2.0, -4.0], [100.0, 0.0]])
    groups = Groups(torch.tensor([2, 0, 1]), 3)
    amax = column_amaxes(x, groups.table)
    assert amax.tolist() == [[2, 8], [0, 0], [100, 0]]
    quantized, scale_inv = quantize_columns(x, amax, E4M3, groups.table, groups.room)
    expected = torch.tensor([[2 / 448, 8 / 448], [1.0, 1.0], [100 / 448, 1.0]])
    assert torch.allclose(scale_inv, expected, rtol=2**-23)
    first, third = quantized.float()[:, :16], quantized.float()[:, 16:32]
    assert first[:, :2].tolist() == [[224.0, 448.0], [448.0, -224.0]] and not first[:, 2:].any()
    assert third[:, 0].tolist() == [448.0, 0.0] and not third[:, 1:].any()


def test_where_rows_lie():
    """Tiles of 128, rows, rows from multiples of 16 on; room for the worst that counts may be."""
    groups = Groups(torch.tensor([3, 0, 130]), 135)
    assert groups.table.tolist() == [[1, 1, 3], [3, 3, 133], [16, 16, 160]]
    assert groups.bounds == [(0, 3), (3, 3), (3, 133)] and groups.aligned_bounds == [(0, 16), (16, 16), (16, 160)]
    assert groups.room >= 160 and groups.room % 16 == 0


def grouped_product_of_torch(a, b, scale_a, scale_b, offs=None, out_dtype=None, use_fast_accum=False):
    """What `torch._scaled_grouped_mm` computes and demands, written out: row-wise scales, both operands by rows of 16
    bytes.

    [S, Q] with [E, Q, R]: scales [S] and [E, R], groups of rows;  [P, S] with [S, R]: scales [E * P] and [E * R],
                                                                   groups of the sum.
    Memory that belongs to no group comes back as NaN: the kernel does not write it.
    """
    assert a.dtype == b.dtype == torch.float8_e4m3fn and offs.dtype == torch.int32 and out_dtype == torch.bfloat16
    assert 0 not in (*a.shape, *b.shape), "nothing to multiply"
    assert a.stride(-1) == 1 and b.stride(-2) == 1, "left by rows, right by columns"
    assert a.stride(-2) % 16 == 0 and b.stride(-1) % 16 == 0, "16 bytes"
    bounds = list(zip([0, *offs.tolist()[:-1]], offs.tolist(), strict=True))
    if b.dim() == 3:
        out = torch.full((a.shape[0], b.shape[2]), torch.nan)
        for e, (first, last) in enumerate(bounds):
            product = a[first:last].float() @ b[e].float()
            out[first:last] = product * scale_a[first:last, None] * scale_b[e]
        return out.to(out_dtype)
    experts, rows, columns = len(bounds), a.shape[0], b.shape[1]
    out = torch.full((experts, rows, columns), torch.nan)
    for e, (first, last) in enumerate(bounds):
        assert first % 16 == last % 16 == 0, "each group begins at 16 bytes"
        if last > first:
            product = a[:, first:last].float() @ b[first:last].float()
            out[e] = product * scale_a.view(experts, -1)[e][:, None] * scale_b.view(experts, -1)[e]
    return out.to(out_dtype)


@pytest.mark.parametrize("counts", COUNTS)
def test_one_launch_for_all_experts_gives_the_references_numbers(counts, monkeypatch):
    """Hopper's path with torch's product written out: the same quantized values and scales, once each expert and once
    all together.
    """
    from ds_fp8.layers import grouped_rows

    extra = 6 if counts == "rows of nobody" else 0
    expected = run(RECIPES["current"], COUNTS[counts], extra=extra, dtype=torch.bfloat16)[0]
    monkeypatch.setattr(grouped_rows, "groups_in_one_launch", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", grouped_product_of_torch)
    found = run(RECIPES["current"], COUNTS[counts], extra=extra, dtype=torch.bfloat16)[0]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=2**-7), "a sum in another order, rounded to bf16"
