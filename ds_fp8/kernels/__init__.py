"""Fast kernels and their single entry point: packages above this floor call `ds_fp8.kernels`, never the casts of
`numerics`.

    dispatch    the names; looks at the device and picks C++, Triton or the PyTorch reference
    grouped     the same for casts and rows of stacked experts
    messages    the same for whole rounds of the wire
    adam, lion  AdamStep and LionStep, all that one pass of the optimizer reads and writes, and its reference
    self_test   whether this machine's compiler made the right code of them (`ds_fp8 doctor`)
    cpu         C++ for AVX-512, AVX2 and everything else, compiled for this machine
    triton      Triton for NVIDIA GPUs

Each fast path gives the bits of its reference in `ds_fp8.numerics`. Which one runs: `path(device)`.
"""

from __future__ import annotations

from .adam import AdamStep
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
from .messages import decode_rows, encode_messages, sum_messages

__all__ = [
    "AdamStep",
    "LionStep",
    "adam_step",
    "amax",
    "amax_many",
    "decode_rows",
    "dense",
    "dequantize",
    "dequantize_1x128",
    "dequantize_128x128",
    "encode_messages",
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
    "sum_messages",
]
