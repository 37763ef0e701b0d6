"""Stacked experts on the device: torch's grouped product of FP8 rows against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.layers.test_grouped_products import COUNTS, RECIPES


def passes(recipe: str, counts: list[int], extra: int, device: str) -> list[torch.Tensor]:
    from ds_fp8.layers.grouped_products import GroupedProducts
    from ds_fp8.layers.groups import Groups, Layout

    torch.manual_seed(1)
    rows, experts = sum(counts) + extra, len(counts)
    x = torch.randn(rows, 256).bfloat16().to(device).requires_grad_()
    weight = torch.randn(experts, 384, 256).bfloat16().to(device).requires_grad_()
    gradient = torch.randn(rows, 384).bfloat16().to(device)
    groups = Groups(torch.tensor(counts, device=device), rows)
    output = GroupedProducts.apply(x, weight, groups, RECIPES[recipe], Layout(), True)
    output.backward(gradient)
    return [output.detach().float().cpu(), x.grad.float().cpu(), weight.grad.float().cpu()]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("recipe", ["current", "block", "some"])
def test_the_device_computes_what_the_reference_does(recipe, counts):
    """The same quantized values and scales; the sums may be in another order and, in fprop, in fewer bits."""
    extra = 6 if counts == "rows of nobody" else 0
    expected = passes(recipe, COUNTS[counts], extra, "cpu")
    for ours, reference in zip(passes(recipe, COUNTS[counts], extra, "cuda"), expected, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - reference).norm() <= 2**-7 * reference.norm()


@pytest.mark.parametrize("counts", [[3, 1, 196], [0, 60, 130], [0, 0, 0], [200, 0, 0]], ids=str)
@pytest.mark.parametrize("columns", [96, 2880, 28672])
def test_casts_give_the_references_bits(columns, counts):
    """Rows of tokens, columns of each expert, both directions of a weight; zeros, infinities and NaN in them."""
    from ds_fp8.formats import E4M3
    from ds_fp8.kernels import grouped
    from ds_fp8.layers.groups import Groups
    from ds_fp8.numerics import row_scales

    torch.manual_seed(0)
    x = (torch.randn(200, columns) * torch.exp2(torch.randint(-12, 12, (200, 1)).float())).bfloat16()
    x[3], x[5, 7], x[60, 9] = 0, float("inf"), float("nan")
    groups, there = Groups(torch.tensor(counts), 200), Groups(torch.tensor(counts, device="cuda"), 200)
    rows, used = sum(counts), int(groups.table[2, -1])
    same(grouped.quantize_rows(x.cuda(), E4M3), row_scales.quantize_rows(x, E4M3))
    coded, amax = grouped.quantize_rows_measured(x.cuda(), E4M3, there.table)
    wanted = row_scales.quantize_rows_measured(x, E4M3, groups.table)
    same([one[:rows] for one in coded], [one[:rows] for one in wanted[0]])
    assert torch.equal(amax.cpu(), wanted[1])
    assert torch.equal(grouped.column_amaxes(x.cuda(), there.table), amax)
    found = grouped.quantize_columns(x.cuda(), amax, E4M3, there.table, there.room)
    wanted = row_scales.quantize_columns(x, wanted[1], E4M3, groups.table, groups.room)
    same((found[0][:, :used], found[1]), (wanted[0][:, :used], wanted[1]))
    weight = x[:192].view(2, 96, columns)
    coded, amax = grouped.quantize_rows_measured(weight.cuda(), E4M3, None)
    same(coded, row_scales.quantize_rows(weight, E4M3))
    same(
        grouped.quantize_columns(weight.cuda(), amax, E4M3, None, 0),
        row_scales.quantize_rows(weight.transpose(1, 2), E4M3),
    )


def same(found, wanted) -> None:
    """Quantized values byte for byte, but for the sign of a NaN; scale_inv by value."""
    codes, expected = found[0].cpu().contiguous().view(torch.uint8), wanted[0].contiguous().view(torch.uint8)
    assert (((codes & 0x7F) == 0x7F) == ((expected & 0x7F) == 0x7F)).all()
    assert ((codes == expected) | ((expected & 0x7F) == 0x7F)).all()
    scales = found[1].cpu()
    assert torch.equal(scales.isnan(), wanted[1].isnan()) and torch.equal(scales.nan_to_num(), wanted[1].nan_to_num())


def test_zeros_where_a_grouped_product_writes_nothing():
    from ds_fp8.layers.groups import Groups

    groups = Groups(torch.tensor([5, 0, 30, 0], device="cuda"), 50)
    out, stack = torch.ones(50, 300, device="cuda").bfloat16(), torch.ones(4, 70, 90, device="cuda").bfloat16()
    groups.tail_zero(out), groups.without_rows_zero(stack)
    assert out[:35].all() and not out[35:].any()
    assert stack[[0, 2]].all() and not stack[[1, 3]].any()


def silu_gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def clamped_gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@pytest.mark.parametrize("kind", ["silu", "clamped"])
def test_gates_are_those_of_pytorch(kind):
    """Rounded where PyTorch on a CPU rounds: at most one element in a thousand differs, by the last bit of an
    exponential. (PyTorch's sigmoid of bf16 on a GPU takes a shortcut, up to two units of the last place.)
    """
    from ds_fp8.kernels.triton import gates

    torch.manual_seed(0)
    x = (torch.randn(77, 2 * 560) * 4).bfloat16().requires_grad_()
    gradient = torch.randn(77, 560).bfloat16()
    wanted = (silu_gate if kind == "silu" else clamped_gate)(x)
    wanted.backward(gradient)
    found = gates.forward(x.detach().cuda(), kind, 1.702, 7.0)
    backward = gates.backward(x.detach().cuda(), gradient.cuda(), kind, 1.702, 7.0)
    for ours, reference in ((found.cpu(), wanted.detach()), (backward.cpu(), x.grad)):
        assert (ours != reference).float().mean() < 1e-3 and (ours - reference).norm() < 1e-3 * reference.norm()


def test_biases_by_expert():
    from ds_fp8.kernels import grouped
    from ds_fp8.layers.groups import Groups
    from ds_fp8.numerics import row_scales

    torch.manual_seed(0)
    x, bias = torch.randn(200, 272).bfloat16(), torch.randn(3, 272).bfloat16()
    table, there = (Groups(torch.tensor([3, 0, 150], device=device), 200).table for device in ("cpu", "cuda"))
    assert torch.equal(grouped.add_rows(x.cuda(), bias.cuda(), there).cpu(), row_scales.add_rows(x, bias, table))
    assert torch.allclose(grouped.sum_rows(x.cuda(), there).cpu(), row_scales.sum_rows(x, table), rtol=1e-5, atol=1e-4)


def test_rows_come_back_to_their_tokens():
    from ds_fp8.layers.expert_rows import Visits

    torch.manual_seed(0)
    index = torch.rand(60, 8).topk(3).indices
    x, weights, gradient = (
        torch.randn(180, 2880).bfloat16(),
        torch.rand(60, 3).bfloat16(),
        torch.randn(60, 2880).bfloat16(),
    )
    found = []
    for device in ("cpu", "cuda"):
        visits = Visits(index.to(device))
        rows, scores, tokens = (one.detach().to(device).requires_grad_() for one in (x, weights, gradient))
        out = visits.returned(rows, scores)
        out.backward(gradient.to(device))
        visits.spread(tokens).backward(x.to(device))
        found.append([one.detach().float().cpu() for one in (out, rows.grad, tokens.grad, scores.grad)])
    for reference, ours in zip(*found, strict=True):
        assert (ours - reference).norm() < 4e-3 * reference.norm()
    assert torch.equal(found[0][1], found[1][1])
