"""The arithmetic of FP8 in PyTorch: the reference, whose bits every fast path gives.

    dtypes        the one place where a `Format` becomes a torch dtype
    cast          quantize, dequantize, amax: one scale for a tensor
    scaling       scales from amaxes, Transformer Engine's rules
    gemm_blocks   1x128 and 128x128 scales for the operands of a matrix product
    row_scales    one scale for each row or column of an operand, and of stacked experts
    flat          128 consecutive elements of a flat partition share a scale: gradients on the wire, optimizer states
    messages      what travels of a flat tensor: quantized values and scales of its spans, one message per rank
    random_bits   counter-based random numbers and stochastic rounding
    blocks8       int8 in scaled blocks of 128
    blocks16      fp16 in scaled blocks of 128
    expansion     e4m3 values that stretch to the range of their block
    states        how exp_avg and exp_avg_sq lie in memory
    masters       the 16-bit weight plus a remainder
    adam          the update of Adam and AdamW, in torch's order of operations
    lion          the update of Lion

Words: `amax` is the largest absolute value; `scale` multiplies on the way into a narrow format, `scale_inv` on the way
out. Everything is computed in fp32 with IEEE division and product; where a fused multiply-add is meant, the docstring
says `fma`; elsewhere a compiler must not form one. docs/numerics.md has reasons and sources.
"""

from __future__ import annotations

from .cast import amax, dequantize, quantize
from .dtypes import torch_dtype
from .gemm_blocks import dequantize_1x128, dequantize_128x128, quantize_1x128, quantize_128x128
from .random_bits import Stochastic
from .scaling import scale_from_amax

__all__ = [
    "Stochastic",
    "amax",
    "dequantize",
    "dequantize_1x128",
    "dequantize_128x128",
    "quantize",
    "quantize_1x128",
    "quantize_128x128",
    "scale_from_amax",
    "torch_dtype",
]
