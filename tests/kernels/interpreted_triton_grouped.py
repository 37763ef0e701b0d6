"""Kernels of stacked experts in the interpreter against `numerics.row_scales`, bit for bit; gates against PyTorch."""

from __future__ import annotations

import pytest
import torch

from ds_fp8.formats import E4M3
from ds_fp8.kernels.triton import expert_rows, gates, grouped, launch, visits
from ds_fp8.layers.expert_rows import Visits
from ds_fp8.layers.groups import Groups
from ds_fp8.numerics import row_scales
from tests.gpu.test_experts_device import clamped_gate, silu_gate

assert launch.INTERPRETED, "run this file with TRITON_INTERPRET=1"

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
COUNTS = pytest.mark.parametrize("counts", [[3, 1, 140], [0, 20, 7], [0, 0, 0], [130, 0, 70], [16, 16, 16]], ids=str)
ROWS, COLUMNS = 200, 272


def rows(dtype: torch.dtype) -> torch.Tensor:
    """Rows over 24 binades, one of zeros, one with an infinity, one with NaN."""
    torch.manual_seed(0)
    x = (torch.randn(ROWS, COLUMNS) * torch.exp2(torch.randint(-12, 12, (ROWS, 1)).float())).to(dtype)
    x[3], x[5, 7], x[60, 9] = 0, float("inf"), float("nan")
    return x


def same(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Equal bytes, except that a NaN may have either sign; equal scale_inv."""
    one, other = (pair[0].contiguous().view(torch.uint8) for pair in (found, wanted))
    codes = ((one == other) | (((one & 0x7F) == 0x7F) & ((other & 0x7F) == 0x7F))).all()
    return bool(codes) and torch.equal(found[1].nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))


@DTYPES
@COUNTS
def test_rows_and_columns_of_tokens(dtype, counts):
    x, groups = rows(dtype), Groups(torch.tensor(counts), ROWS)
    table, used = groups.table, sum(counts)
    assert same(grouped.quantize_rows(x, E4M3), row_scales.quantize_rows(x, E4M3))
    (quantized, scale_inv), amax = grouped.quantize_rows_measured(x, E4M3, table)
    wanted, wanted_amax = row_scales.quantize_rows_measured(x, E4M3, table)
    assert same((quantized[:used], scale_inv[:used]), (wanted[0][:used], wanted[1][:used]))
    assert torch.equal(amax, wanted_amax) and torch.equal(grouped.column_amaxes(x, table), wanted_amax)
    found = grouped.quantize_columns(x, amax, E4M3, table, groups.room)
    wanted = row_scales.quantize_columns(x, amax, E4M3, table, groups.room)
    end = int(table[2, -1])
    assert same((found[0][:, :end], found[1]), (wanted[0][:, :end], wanted[1]))


@DTYPES
def test_weights_in_both_directions(dtype):
    weight = rows(dtype)[:192].view(2, 96, COLUMNS)
    coded, amax = grouped.quantize_rows_measured(weight, E4M3, None)
    assert same(coded, row_scales.quantize_rows(weight, E4M3))
    assert torch.equal(amax, row_scales.column_amaxes(weight, None))
    found = grouped.quantize_columns(weight, amax, E4M3, None, 0)
    assert same(found, row_scales.quantize_rows(weight.transpose(1, 2), E4M3))


@DTYPES
@COUNTS
def test_biases_and_what_no_product_writes(dtype, counts):
    x, groups = rows(dtype).nan_to_num(1.0, 1.0), Groups(torch.tensor(counts), ROWS)
    bias = torch.randn(3, COLUMNS)
    assert torch.equal(expert_rows.add_rows(x, bias, groups.table), row_scales.add_rows(x, bias, groups.table))
    assert torch.allclose(
        expert_rows.sum_rows(x, groups.table), row_scales.sum_rows(x, groups.table), rtol=1e-5, atol=1e-2
    )
    out, stack = torch.ones(ROWS, 40, dtype=dtype), torch.ones(3, 70, 90, dtype=dtype)
    expert_rows.zero_tail(out, groups.ends[-1:])
    expert_rows.zero_experts(stack, groups.ends)
    assert out[: sum(counts)].all() and not out[sum(counts) :].any()
    assert [bool(one.all()) for one in stack] == [bool(count) for count in counts]
    assert not stack[groups.counts == 0].any()


@DTYPES
@pytest.mark.parametrize("kind", ["silu", "clamped"])
def test_gates(kind, dtype):
    """bf16 rounds as PyTorch does, operation by operation; fp32 within a few units of the last place."""
    x = (torch.randn(9, 2 * 560) * 4).to(dtype).requires_grad_()
    gradient = torch.randn(9, 560).to(dtype)
    wanted = (silu_gate if kind == "silu" else clamped_gate)(x)
    wanted.backward(gradient)
    found = gates.forward(x.detach(), kind, 1.702, 7.0)
    backward = gates.backward(x.detach(), gradient, kind, 1.702, 7.0)
    for ours, reference in ((found, wanted.detach()), (backward, x.grad)):
        assert (ours != reference).float().mean() < (1e-3 if dtype == torch.bfloat16 else 0.3)
        assert (ours - reference).norm() < 1e-3 * reference.norm() * (1 if dtype == torch.bfloat16 else 1e-3)


@DTYPES
def test_rows_come_back_to_their_tokens(dtype):
    """The layer on a CPU is PyTorch's own operations: sums to the bit, the gradient of a weight summed in another
    order.
    """
    torch.manual_seed(0)
    there = Visits(torch.rand(30, 8).topk(3).indices)
    x = torch.randn(90, 200).to(dtype)
    for weights in (torch.rand(30, 3).to(dtype), torch.rand(30, 3)):
        rows, scores = x.clone().requires_grad_(), weights.clone().requires_grad_()
        wanted = there.returned(rows, scores)
        assert wanted.dtype == (x[:30] * weights[:, :1]).dtype
        gradient = torch.randn(30, 200).to(wanted.dtype)
        wanted.backward(gradient)
        assert torch.equal(visits.sum_visits(x, there.back, 3, weights.flatten()), wanted)
        found = visits.sum_visits_backward(gradient, x, there.order, 3, weights.flatten())
        assert torch.equal(found[0], rows.grad)
        assert torch.allclose(found[1].view(30, 3).to(weights.dtype), scores.grad, rtol=1e-2, atol=1e-4)
    tokens = torch.randn(30, 200).to(dtype).requires_grad_()
    there.spread(tokens).backward(x)
    assert torch.equal(visits.sum_visits(x, there.back, 3, None), tokens.grad)
