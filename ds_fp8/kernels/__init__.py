"""The fast paths and the one door to them: everyone above this floor calls `ds_fp8.kernels`, never `numerics`' casts.

    dispatch   the names; looks at the device and picks C++, Triton or the PyTorch reference
    adam       AdamStep, all that one pass of the optimizer reads and writes, and its reference
    cpu        C++ for AVX-512, AVX2 and everything else, compiled for this machine
    triton     Triton for NVIDIA GPUs

Each fast path is a twin of `ds_fp8.numerics`: same inputs, same bits. Which one runs: `path(device)`.
"""

from __future__ import annotations

from .adam import AdamStep, WeightCodes
from .dispatch import (
    adam_step,
    amax,
    amax_many,
    dense,
    dequantize,
    dequantize_1x128,
    dequantize_128x128,
    flat_decode,
    flat_encode,
    flat_sum,
    flat_sum_encode,
    library_for,
    lion_step,
    path,
    quantize,
    quantize_1x128,
    quantize_128x128,
    quantize_many,
    quantize_with_amax,
)
from .lion import LionStep

__all__ = [
    "AdamStep",
    "LionStep",
    "WeightCodes",
    "adam_step",
    "amax",
    "amax_many",
    "dense",
    "dequantize",
    "dequantize_1x128",
    "dequantize_128x128",
    "flat_decode",
    "flat_encode",
    "flat_sum",
    "flat_sum_encode",
    "library_for",
    "lion_step",
    "path",
    "quantize",
    "quantize_1x128",
    "quantize_128x128",
    "quantize_many",
    "quantize_with_amax",
]
