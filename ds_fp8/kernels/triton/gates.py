"""Gated activations of experts on a GPU: one launch forward and one backward, where PyTorch takes a pass per operation.

    silu      gate, up = the halves of a row;            out = silu(gate) * up
    clamped   gate, up = its even and its odd elements;  out = (up + 1) * gate * sigmoid(alpha * gate), gate at most
              `limit` and up within +-limit

Every operation is rounded to the tensors' dtype as PyTorch's own kernels round theirs, so the values are the same but
for the last bit of an exponential. The backward computes the forward's values anew from the product that it reads
anyway: nothing but that product is kept.
Source: transformers' `_default_apply_gate` and gpt-oss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import codec
from .launch import LAUNCH, on_device

KINDS = {"silu": 0, "clamped": 1}
"""Gate -> the constexpr KIND of the kernels."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

ROWS, COLUMNS, WARPS = 4, 512, 4


@triton.jit
def rounded(x, pointer):
    """fp32 `x` as the pointer's dtype holds it."""
    if pointer.dtype.element_ty == tl.bfloat16:
        value = (codec.bf16_bits(x) << 16).to(tl.float32, bitcast=True)
    elif pointer.dtype.element_ty == tl.float16:
        value = x.to(tl.float16).to(tl.float32)
    else:
        value = x
    return value


@triton.jit
def _sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def _load(x_ptr, rows, width, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Gate and up of one program, fp32 [ROWS, COLUMNS]; where out lies, and what of it exists."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    if KIND == 0:
        place = row[:, None] * (2 * width) + column[None, :]
        gate, up = codec.load(x_ptr + place, inside), codec.load(x_ptr + place + width, inside)
    else:
        place, both_inside = _pairs(row, rows, width, COLUMNS)
        both = codec.load(x_ptr + place, both_inside)
        gate, up = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    return gate, up, row[:, None] * width + column[None, :], inside


@triton.jit
def _pairs(row, rows, width, COLUMNS: tl.constexpr):
    """Where the elements of gate and up lie that alternate, in whole lines, and which exist."""
    column = tl.program_id(1) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
    return row[:, None] * (2 * width) + column[None, :], (row < rows)[:, None] & (column < 2 * width)[None, :]


@triton.jit
def _gate_kernel(
    x_ptr, out_ptr, rows, width, alpha, limit, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    gate, up, out_at, inside = _load(x_ptr, rows, width, KIND, ROWS, COLUMNS)
    if KIND == 0:
        out = rounded(tl.div_rn(gate, 1.0 + tl.exp(-gate)), x_ptr) * up
    else:
        gate, up = _at_most(gate, limit), _at_least(_at_most(up, limit), -limit)
        part = rounded(_sigmoid(rounded(gate * alpha, x_ptr)), x_ptr)
        out = rounded(up + 1.0, x_ptr) * rounded(gate * part, x_ptr)
    codec.store(out_ptr + out_at, out, inside)


@triton.jit
def _gate_backward_kernel(x_ptr, grad_ptr, out_ptr, rows, width, alpha, limit, KIND: tl.constexpr, ROWS: tl.constexpr,
                          COLUMNS: tl.constexpr):  # fmt: skip
    gate, up, grad_at, inside = _load(x_ptr, rows, width, KIND, ROWS, COLUMNS)
    grad = codec.load(grad_ptr + grad_at, inside)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if KIND == 0:
        part = _sigmoid(gate)
        grad_up = grad * rounded(tl.div_rn(gate, 1.0 + tl.exp(-gate)), x_ptr)
        grad_gate = rounded(grad * up, x_ptr) * part * (1.0 + gate * (1.0 - part))
        place = row[:, None] * (2 * width) + (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        codec.store(out_ptr + place, grad_gate, inside)
        codec.store(out_ptr + place + width, grad_up, inside)
    else:
        low, high = _at_most(gate, limit), _at_least(_at_most(up, limit), -limit)
        part = rounded(_sigmoid(rounded(low * alpha, x_ptr)), x_ptr)
        grad_up = grad * rounded(low * part, x_ptr)
        grad_up = tl.where((up >= -limit) & (up <= limit), grad_up, 0.0)
        grad_glu = rounded(grad * rounded(high + 1.0, x_ptr), x_ptr)
        through = rounded(rounded(grad_glu * low, x_ptr) * (1.0 - part) * part, x_ptr)
        grad_gate = rounded(grad_glu * part, x_ptr) + rounded(through * alpha, x_ptr)
        grad_gate = tl.where(gate <= limit, grad_gate, 0.0)
        place, both_inside = _pairs(row, rows, width, COLUMNS)
        codec.store(out_ptr + place, tl.interleave(grad_gate, grad_up), both_inside)


@triton.jit
def _at_most(x, limit):
    """NaN stays NaN, as with torch.clamp."""
    return tl.where(x > limit, limit, x)


@triton.jit
def _at_least(x, limit):
    return tl.where(x < limit, limit, x)


def forward(x: torch.Tensor, kind: str, alpha: float, limit: float) -> torch.Tensor:
    """Contiguous `x` [rows, 2 * width] -> [rows, width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if out.numel():
        with on_device(x):
            _gate_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
                x, out, rows, width, alpha, limit, KINDS[kind], ROWS, COLUMNS, num_warps=WARPS, **LAUNCH
            )
    return out


def backward(x: torch.Tensor, grad: torch.Tensor, kind: str, alpha: float, limit: float) -> torch.Tensor:
    """The gradient of `x` [rows, 2 * width] from that of the output, both contiguous."""
    rows, width = grad.shape
    out = torch.empty_like(x)
    if out.numel():
        with on_device(x):
            _gate_backward_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
                x, grad, out, rows, width, alpha, limit, KINDS[kind], ROWS, COLUMNS, num_warps=WARPS, **LAUNCH
            )
    return out
