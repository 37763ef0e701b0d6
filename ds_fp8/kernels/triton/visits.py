"""Rows that visited experts, summed for each token, and the way back: one launch each on a GPU.

    forward   out[t] = sum over j of rows[back[t, j]] * weights[t, j]
    backward  grad_rows[r] = grad[t] * weights[t, j],  grad_weights[t, j] = sum of grad[t] * rows[r]
              where order[r] = (t, j)

Products are rounded to the dtype of `out`, the sum is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import codec
from .gates import FLOATS, rounded
from .launch import LAUNCH, on_device

__all__ = ["FLOATS", "WIDEST", "sum_visits", "sum_visits_backward"]

WIDEST = 16384
"""Columns that one program holds."""


@triton.jit
def _sum_kernel(rows_ptr, back_ptr, weights_ptr, out_ptr, columns, each, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([COLUMNS], tl.float32)
    visit = token * each
    end = visit + each
    while visit < end:
        row = tl.load(back_ptr + visit)
        value = codec.load(rows_ptr + row * columns + column, inside)
        if WEIGHTED:
            value = rounded(value * tl.load(weights_ptr + visit).to(tl.float32), out_ptr)
        total += value
        visit += 1
    codec.store(out_ptr + token * columns + column, total, inside)


@triton.jit
def _backward_kernel(grad_ptr, rows_ptr, order_ptr, weights_ptr, grad_rows_ptr, grad_weights_ptr, columns, each,
                     COLUMNS: tl.constexpr):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    inside = column < columns
    visit = tl.load(order_ptr + row)
    grad = codec.load(grad_ptr + (visit // each) * columns + column, inside)
    weight = tl.load(weights_ptr + visit).to(tl.float32)
    codec.store(grad_rows_ptr + row * columns + column, grad * weight, inside)
    value = codec.load(rows_ptr + row * columns + column, inside)
    tl.store(grad_weights_ptr + visit, tl.sum(grad * value, axis=0))


def sum_visits(rows: torch.Tensor, back: torch.Tensor, each: int, weights: torch.Tensor | None) -> torch.Tensor:
    """Contiguous `rows` [tokens * each, columns], `back` [tokens * each] int64, `weights` [tokens * each], None for 1
    -> [tokens, columns] in the dtype that PyTorch gives the product.
    """
    columns = rows.shape[1]
    dtype = rows.dtype if weights is None else torch.promote_types(rows.dtype, weights.dtype)
    out = torch.empty(rows.shape[0] // each, columns, dtype=dtype, device=rows.device)
    if out.numel():
        block = triton.next_power_of_2(columns)
        with on_device(rows):
            _sum_kernel[(out.shape[0],)](
                rows, back, rows if weights is None else weights, out, columns, each, weights is not None, block,
                num_warps=max(1, min(8, block // 512)), **LAUNCH,
            )  # fmt: skip
    return out


def sum_visits_backward(
    grad: torch.Tensor, rows: torch.Tensor, order: torch.Tensor, each: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows and, fp32 [tokens * each], of weights, for contiguous `grad` [tokens, columns]."""
    columns = rows.shape[1]
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty(order.shape, dtype=torch.float32, device=rows.device)
    if rows.numel():
        block = triton.next_power_of_2(columns)
        with on_device(rows):
            _backward_kernel[(rows.shape[0],)](
                grad, rows, order, weights, grad_rows, grad_weights, columns, each, block,
                num_warps=max(1, min(8, block // 512)), **LAUNCH,
            )  # fmt: skip
    return grad_rows, grad_weights
