"""Products of stacked experts with one scale per row: what recipes `current` and `delayed` do with them.

    fprop   output      [S, N]    = input       [S, K] @ weight.T [K, N]      scales: token, output of an expert
    dgrad   grad_input  [S, K]    = grad_output [S, N] @ weight   [N, K]      scales: token, input of an expert
    wgrad   grad_weight [E, N, K] = grad_output.T      @ input                scales: column of an expert's rows, both

S rows sorted by expert, each with its own expert's weight. All operands are e4m3, gradients too: a scale for each token
leaves no range for e5m2 to cover, and the tensor cores' grouped product takes nothing else. Weights that are cast
outside of the module (O3, frozen weights) have one scale for each expert, so that fprop and dgrad read the same data,
one byte per weight. Where it runs:

    Hopper                    torch._scaled_grouped_mm: one launch for all experts, the host waits for nothing
    other GPUs with FP8       torch._scaled_mm for each expert
    everything else           decoded and multiplied in fp32: exact in its operands; the reference

Signatures are those of `grouped_blocks`, whose formats follow from the recipe; here they are not asked for.
"""

from __future__ import annotations

import torch

from ..capabilities import FP8_SINCE
from ..formats import E4M3, Format
from ..kernels import dense
from ..kernels import grouped as casts
from .groups import Groups, Stack

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Quantized values [.., rows, columns] and scale_inv [.., rows]; an operand of wgrad is [columns, room] (`Groups.room`)
with scale_inv [E, columns].
"""


def fprop(x: torch.Tensor, weight: Stack, groups: Groups, dtype: torch.dtype, *_: Format) -> torch.Tensor:
    """x [S, K] with the weights [E, N, K] -> [S, N]."""
    return by_rows(casts.quantize_rows(x, E4M3), weight.once("fprop", along_inputs), groups, dtype)


def dgrad(grad_output: torch.Tensor, weight: Stack, groups: Groups, dtype: torch.dtype, *_: Format) -> torch.Tensor:
    """grad_output [S, N] with the weights [E, N, K] -> [S, K]."""
    return by_rows(casts.quantize_rows(grad_output, E4M3), weight.once("dgrad", along_outputs), groups, dtype)


def keep_for_wgrad(x: torch.Tensor, groups: Groups, *_: Format) -> Quantized:
    """An operand of wgrad in quantized form: one byte for each element until the backward."""
    return casts.quantize_columns(x, casts.column_amaxes(x, groups.table), E4M3, groups.table, groups.room)


def wgrad(grad_output: torch.Tensor, kept: Quantized, groups: Groups, dtype: torch.dtype, *_: Format,
          transposed: bool = False) -> torch.Tensor:  # fmt: skip
    """grad_output [S, N] with the kept input [S, K] -> [E, N, K], or [E, K, N]; zeros for experts without rows."""
    return by_columns(keep_for_wgrad(grad_output, groups), kept, groups, dtype, transposed)


def along_inputs(weight: Stack) -> Quantized:
    """Quantized [E, N, K] and scale_inv [E, N]: for fprop, which sums over the inputs."""
    if weight.whole:
        return _of_whole_experts(weight, turned=weight.transposed)
    if weight.transposed:
        return casts.quantize_columns(weight.data, _amaxes(weight), E4M3, None, 0)
    if not weight.dgrad_follows:
        return casts.quantize_rows(weight.data, E4M3)
    quantized, weight.column_amaxes = casts.quantize_rows_measured(weight.data, E4M3, None)
    return quantized


def along_outputs(weight: Stack) -> Quantized:
    """Quantized [E, K, N] and scale_inv [E, K]: for dgrad, which sums over the outputs."""
    if weight.whole:
        return _of_whole_experts(weight, turned=not weight.transposed)
    if weight.transposed:
        return casts.quantize_rows(weight.data, E4M3)
    return casts.quantize_columns(weight.data, _amaxes(weight), E4M3, None, 0)


def _of_whole_experts(weight: Stack, *, turned: bool) -> Quantized:
    """Data with one scale for each expert, as the weights lie or `turned`; the scale for each of their rows."""
    data, scale_inv = weight.given or weight.once("whole", lambda stack: casts.quantize_experts(stack.data, E4M3))
    if turned:
        data = dense(data.transpose(1, 2))
    return data, scale_inv.unsqueeze(1).expand(-1, data.shape[1]).contiguous()


def _amaxes(weight: Stack) -> torch.Tensor:
    if weight.column_amaxes is None:
        weight.column_amaxes = casts.column_amaxes(weight.data, None)
    return weight.column_amaxes


def by_rows(rows: Quantized, weight: Quantized, groups: Groups, dtype: torch.dtype) -> torch.Tensor:
    """[S, Q] rows with [E, R, Q] weights -> [S, R]; zeros for rows of no expert."""
    if groups.rows and groups_in_one_launch(rows[0].device):
        out = torch._scaled_grouped_mm(
            rows[0],
            weight[0].transpose(1, 2),
            rows[1],
            weight[1],
            offs=groups.ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return groups.tail_zero(out).to(dtype)
    out = rows[1].new_zeros((groups.rows, weight[0].shape[1]), dtype=dtype)
    for expert, (first, last) in enumerate(groups.bounds):
        if last > first:
            a = rows[0][first:last], rows[1][first:last]
            out[first:last] = _product(a, (weight[0][expert], weight[1][expert]), dtype)
    return out


def by_columns(left: Quantized, right: Quantized, groups: Groups, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """Sums over each expert's rows of two operands cast for wgrad, [P, room] and [R, room] -> [E, P, R]; [E, R, P] if
    `transposed`.
    """
    if transposed:
        left, right = right, left
    if groups_in_one_launch(left[0].device):
        out = torch._scaled_grouped_mm(
            left[0],
            right[0].t(),
            left[1].flatten(),
            right[1].flatten(),
            offs=groups.table[2],
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
        return groups.without_rows_zero(out).to(dtype)
    out = left[1].new_zeros((groups.experts, left[0].shape[0], right[0].shape[0]), dtype=dtype)
    for expert, (first, last) in enumerate(groups.aligned_bounds):
        if last > first:
            a = left[0][:, first:last].contiguous(), left[1][expert]
            b = right[0][:, first:last].contiguous(), right[1][expert]
            out[expert] = _product(a, b, dtype)
    return out


def _product(a: Quantized, b: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """[P, Q] with [R, Q], both summed over their last axis, one scale for each row -> [P, R]."""
    if a[0].is_cuda and torch.cuda.get_device_capability(a[0].device) >= FP8_SINCE:
        out = torch._scaled_mm(
            a[0], b[0].t(), scale_a=a[1].unsqueeze(1), scale_b=b[1].unsqueeze(0), out_dtype=torch.bfloat16
        )
        return out.to(dtype)
    return ((a[0].float() @ b[0].float().t()) * a[1].unsqueeze(1) * b[1].unsqueeze(0)).to(dtype)


def groups_in_one_launch(device: torch.device) -> bool:
    """Whether torch has a grouped product of FP8 rows there: Hopper."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and hasattr(torch, "_scaled_grouped_mm")
    )
