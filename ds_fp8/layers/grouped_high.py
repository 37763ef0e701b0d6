"""Products of stacked experts in high precision: what an FP8 expert does where one of its three products stays as it
was.
"""

from __future__ import annotations

import torch

from .groups import Groups


def by_rows(x: torch.Tensor, weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """x [S, Q] with weights [E, R, Q], in any layout -> [S, R] in x's dtype; zeros for rows of no expert."""
    if in_one_launch(x):
        out = torch.nn.functional.grouped_mm(x, weight.transpose(1, 2).to(x.dtype), offs=groups.ends)
        return groups.tail_zero(out)
    out = x.new_zeros((groups.rows, weight.shape[1]))
    for expert, (first, last) in enumerate(groups.bounds):
        if last > first:
            out[first:last] = x[first:last] @ weight[expert].t().to(x.dtype)
    return out


def wgrad(
    grad_output: torch.Tensor, x: torch.Tensor, groups: Groups, dtype: torch.dtype, transposed: bool
) -> torch.Tensor:
    """grad_output [S, N], x [S, K] -> [E, N, K], or [E, K, N] if `transposed`; zeros for experts without rows."""
    left, right = (x, grad_output) if transposed else (grad_output, x)
    if in_one_launch(x):
        out = torch.nn.functional.grouped_mm(left.t(), right, offs=groups.ends)
        return groups.without_rows_zero(out).to(dtype)
    out = x.new_zeros((groups.experts, left.shape[1], right.shape[1]), dtype=dtype)
    for expert, (first, last) in enumerate(groups.bounds):
        if last > first:
            out[expert] = (left[first:last].t() @ right[first:last]).to(dtype)
    return out


def in_one_launch(x: torch.Tensor) -> bool:
    """Whether torch multiplies all experts' rows of this dtype in one launch."""
    return (
        x.is_cuda
        and x.shape[0] > 0
        and x.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
