"""The product of two FP8 operands: `a [P, Q] @ b [R, Q].T -> [P, R]`, both summed over their last axis.

With one scale per tensor, a GPU with FP8 products runs `torch._scaled_mm`. Everywhere else the quantized values are
decoded and multiplied: every e4m3 and e5m2 value is exact in bf16, so with fp32 accumulation such a product is exact in
its operands, and the scales are applied once to the sum, in fp32 where rows have their own. Block scales are applied on
decoding; as powers of two they are exact in bf16 as well, up to bf16's range.

    output dtype    decoded to    why
    bf16            bf16          exact operands, and the product of bf16 is the fastest a CPU has
    fp16, fp32      fp32          the sum keeps more bits than bf16 has
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ..capabilities import FP8_SINCE
from ..kernels import dense
from .operands import ROWS, TENSOR, Operand

STEP = 16
"""`torch._scaled_mm` wants the summed axis, and the columns of the result, in multiples of this."""


def matmul(
    a: Operand, b: Operand, dtype: torch.dtype, *, bias: torch.Tensor | None = None, fast: bool = False
) -> torch.Tensor:
    """a [P, Q] @ b [R, Q].T (+ bias [R]) -> [P, R] in `dtype`, accumulated in fp32.

    fast  let the tensor cores accumulate in fewer bits (Hopper), as Transformer Engine does for fprop only
    """
    rows, inner = a.data.shape
    columns = b.data.shape[0]
    if rows == 0 or inner == 0:
        out = a.data.new_zeros((rows, columns), dtype=dtype)
        return out if bias is None else out + bias.to(dtype)
    if a.extent == b.extent == TENSOR and multiplies_fp8(a.data.device):
        return _scaled(a, b, dtype, bias, fast)
    if a.extent == b.extent == ROWS:
        return _by_rows(a, b, dtype, bias, fast)
    return _emulated(a, b, dtype, bias)


def _emulated(a: Operand, b: Operand, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    between = inside(dtype)
    left, right = a.decode(between), b.decode(between).t()
    factor = a.scale_inv * b.scale_inv if a.extent == b.extent == TENSOR else None
    if between == torch.bfloat16 and left.device.type == "cpu":
        # bias + factor * sum in fp32, rounded to bf16 once (tests/layers/test_gemm.py). Not for fp32: MKL's sgemm drops
        # an alpha of NaN, which says here that the operand was not finite.
        alpha = 1.0 if factor is None else float(factor)
        if bias is None:
            return torch.addmm(left.new_empty(right.shape[1]), left, right, beta=0, alpha=alpha)
        return torch.addmm(bias.to(between), left, right, alpha=alpha)
    out = left @ right
    if factor is not None and bias is not None and out.device.type == "cpu":
        return torch.add(bias.to(between), out, alpha=float(factor)).to(dtype)
    if factor is not None:
        out = out.mul_(factor)
    return (out if bias is None else out.add_(bias.to(between))).to(dtype)


def _scaled(a: Operand, b: Operand, dtype: torch.dtype, bias: torch.Tensor | None, fast: bool) -> torch.Tensor:
    """cuBLASLt's layout: `a` by rows, `b` by columns, so the quantized [R, Q] of `b` lie by rows and go in
    transposed.
    """
    rows, columns = a.data.shape[0], b.data.shape[0]
    left, right = _padded(a.data, 1), _padded(b.data, STEP)
    fused = bias.to(dtype) if bias is not None and dtype != torch.float32 and right.shape[0] == columns else None
    scale_a, scale_b = aligned(a.scale_inv), aligned(b.scale_inv)
    out = torch._scaled_mm(
        left, right.t(), scale_a=scale_a, scale_b=scale_b, bias=fused, out_dtype=dtype, use_fast_accum=fast
    )
    if out.shape != (rows, columns):
        out = out[:rows, :columns].contiguous()
    return out if bias is None or fused is not None else out + bias.to(dtype)


def _by_rows(a: Operand, b: Operand, dtype: torch.dtype, bias: torch.Tensor | None, fast: bool) -> torch.Tensor:
    """One scale for each row of `a` and of `b`: they multiply the sums, in fp32, before the one rounding."""
    rows, columns = a.data.shape[0], b.data.shape[0]
    if dtype != torch.bfloat16 or not multiplies_rows(a.data.device):
        out = a.decode(torch.float32) @ b.decode(torch.float32).t()
        out = out.mul_(b.scale_inv).mul_(a.scale_inv.unsqueeze(1))
        return (out if bias is None else out.add_(bias.float())).to(dtype)
    left, right = _padded(a.data, 1), _padded(b.data, STEP)
    fused = bias.to(dtype) if bias is not None and right.shape[0] == columns else None
    scale_b = F.pad(b.scale_inv, (0, right.shape[0] - columns), value=1.0)
    out = torch._scaled_mm(
        left,
        right.t(),
        scale_a=a.scale_inv.unsqueeze(1),
        scale_b=scale_b.unsqueeze(0),
        bias=fused,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    if out.shape != (rows, columns):
        out = out[:rows, :columns].contiguous()
    return out if bias is None or fused is not None else out + bias.to(dtype)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it: cuBLASLt reads scales and data only from addresses that are multiples of 16
    bytes.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _padded(quantized: torch.Tensor, row_step: int) -> torch.Tensor:
    """Contiguous quantized values with zeros up to the next multiple of 16 along the summed axis: a zero adds
    nothing.
    """
    down, right = -quantized.shape[0] % row_step, -quantized.shape[1] % STEP
    if not down and not right:
        return dense(quantized)
    padded = quantized.new_zeros((quantized.shape[0] + down, quantized.shape[1] + right))
    padded[: quantized.shape[0], : quantized.shape[1]] = quantized
    return padded


def inside(dtype: torch.dtype) -> torch.dtype:
    """What operands are decoded to for an emulated product that comes out in `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@functools.cache
def multiplies_rows(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes one scale per row there: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether products of operands with one scale run in FP8; everywhere else they are emulated."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_SINCE
