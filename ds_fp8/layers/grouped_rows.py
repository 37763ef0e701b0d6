"""Products of stacked experts with one scale per row: what recipes `current` and `delayed` do with them.

    fprop   output      [S, N]    = input       [S, K] @ weight.T [K, N]      scales: token, output of an expert
    dgrad   grad_input  [S, K]    = grad_output [S, N] @ weight   [N, K]      scales: token, input of an expert
    wgrad   grad_weight [E, N, K] = grad_output.T      @ input                scales: column of an expert's rows, both

S rows sorted by expert, each with its own expert's weight. All operands are e4m3, gradients too: a scale for each token
leaves no range for e5m2 to cover, and the tensor cores' grouped product takes nothing else. Where it runs:

    Hopper                    torch._scaled_grouped_mm: one launch for all experts, the host waits for nothing
    other GPUs with FP8       torch._scaled_mm for each expert
    everything else           decoded and multiplied in fp32: exact in its operands; the reference

Signatures are those of `grouped_blocks`, whose formats follow from the recipe; here they are not asked for.
"""

from __future__ import annotations

import torch

from ..capabilities import FP8_SINCE
from ..formats import E4M3, Format
from ..numerics.row_scales import quantize_columns, quantize_rows
from .groups import Groups

Coded = tuple[torch.Tensor, torch.Tensor]
"""Quantized values [.., rows, columns] and scale_inv [.., rows]; for an operand of wgrad quantized [S, columns],
scale_inv [E, columns].
"""


def fprop(x: torch.Tensor, weight: torch.Tensor, groups: Groups, dtype: torch.dtype, *_: Format) -> torch.Tensor:
    """x [S, K] with weight [E, N, K] -> [S, N]."""
    return _by_rows(quantize_rows(x, E4M3), quantize_rows(weight, E4M3), groups, dtype)


def dgrad(
    grad_output: torch.Tensor, weight: torch.Tensor, groups: Groups, dtype: torch.dtype, *_: Format
) -> torch.Tensor:
    """grad_output [S, N] with weight [E, N, K] -> [S, K]."""
    return _by_rows(quantize_rows(grad_output, E4M3), quantize_rows(weight.transpose(1, 2), E4M3), groups, dtype)


def keep_for_wgrad(x: torch.Tensor, groups: Groups, *_: Format) -> Coded:
    """An operand of wgrad in quantized form: one byte for each element until the backward."""
    return quantize_columns(x, groups.owner, groups.experts, E4M3)


def wgrad(grad_output: torch.Tensor, kept: Coded, groups: Groups, dtype: torch.dtype, *_: Format) -> torch.Tensor:
    """grad_output [S, N] with the kept input [S, K] -> [E, N, K]; zeros for experts without rows."""
    left, right = keep_for_wgrad(grad_output, groups), kept
    if groups_in_one_launch(grad_output.device):
        ends, places, room = groups.aligned()
        out = torch._scaled_grouped_mm(
            _transposed(left[0], places, room),
            _transposed(right[0], places, room).t(),
            left[1].flatten(),
            right[1].flatten(),
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
        return out.masked_fill_((groups.counts == 0).view(-1, 1, 1), 0).to(dtype)
    out = grad_output.new_zeros((groups.experts, left[0].shape[1], right[0].shape[1]), dtype=dtype)
    for expert, (first, last) in enumerate(groups.bounds):
        if last > first:
            a = _dense(left[0][first:last]), left[1][expert]
            b = _dense(right[0][first:last]), right[1][expert]
            out[expert] = _product(a, b, dtype)
    return out


def _by_rows(rows: Coded, weight: Coded, groups: Groups, dtype: torch.dtype) -> torch.Tensor:
    """[S, Q] rows with [E, R, Q] weights -> [S, R]; zeros for rows of no expert."""
    if groups_in_one_launch(rows[0].device):
        out = torch._scaled_grouped_mm(
            rows[0],
            weight[0].transpose(1, 2),
            rows[1],
            weight[1],
            offs=groups.ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out.masked_fill_((groups.owner == groups.experts).unsqueeze(1), 0).to(dtype)
    out = rows[1].new_zeros((groups.rows, weight[0].shape[1]), dtype=dtype)
    for expert, (first, last) in enumerate(groups.bounds):
        if last > first:
            a = rows[0][first:last], rows[1][first:last]
            out[first:last] = _product(a, (weight[0][expert], weight[1][expert]), dtype)
    return out


def _product(a: Coded, b: Coded, dtype: torch.dtype) -> torch.Tensor:
    """[P, Q] with [R, Q], both summed over their last axis, one scale for each row -> [P, R]."""
    if a[0].is_cuda and torch.cuda.get_device_capability(a[0].device) >= FP8_SINCE:
        short = -a[0].shape[1] % 16
        left, right = (torch.nn.functional.pad(c.view(torch.uint8), (0, short)).view(c.dtype) for c in (a[0], b[0]))
        out = torch._scaled_mm(
            left, right.t(), scale_a=a[1].unsqueeze(1), scale_b=b[1].unsqueeze(0), out_dtype=torch.bfloat16
        )
        return out.to(dtype)
    return ((a[0].float() @ b[0].float().t()) * a[1].unsqueeze(1) * b[1].unsqueeze(0)).to(dtype)


def _dense(quantized: torch.Tensor) -> torch.Tensor:
    """Quantized values [rows, columns] transposed, dense in memory."""
    return quantized.t().contiguous()


def _transposed(quantized: torch.Tensor, places: torch.Tensor, room: int) -> torch.Tensor:
    """Quantized values [S, columns] as [columns, room], each row at its place; a zero adds nothing to a sum."""
    wide = quantized.new_zeros((room, quantized.shape[1]), dtype=torch.uint8)
    wide.index_copy_(0, places, quantized.view(torch.uint8))
    return wide.t().contiguous().view(quantized.dtype)


def groups_in_one_launch(device: torch.device) -> bool:
    """Whether torch has a grouped product of FP8 rows there: Hopper."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and hasattr(torch, "_scaled_grouped_mm")
    )
