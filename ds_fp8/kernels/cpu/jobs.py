"""The jobs of jobs.h, spelled for ctypes, field by field in the same order.

A job is pointers and sizes. `loader.load` compares the sizes of both spellings, so a field added on one side
only is found at load and not as a crash.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p

import torch

from ...formats import Format
from ...levels import MASTERS, OWN, STATES

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {"e4m3": 0, "e5m2": 1}

QUANTIZE, DEQUANTIZE, FLAT_ENCODE, FLAT_SUM, TILE_QUANTIZE, TILE_DEQUANTIZE, ADAM = range(7)

STATE_FORMATS = {name: fmt.cpp for name, fmt in STATES.items() if fmt.cpp is not None}
MASTER_FORMATS = {OWN: 0} | {name: fmt.cpp for name, fmt in MASTERS.items() if fmt.cpp is not None}
ADAM_SCALARS = (
    "decay", "l2", "beta2", "one_minus_beta1", "one_minus_beta2", "bias_correction2_sqrt", "eps", "step_size",
    "inverse_correction2_sqrt",
)  # fmt: skip


class QuantizeJob(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("quantized", c_void_p),
        ("scale", c_void_p),
        ("amax", c_void_p),
        ("numel", c_int64),
        ("dtype", c_int32),
        ("fmt", c_int32),
    )


class DequantizeJob(ctypes.Structure):
    _fields_ = (
        ("quantized", c_void_p),
        ("scale_inv", c_void_p),
        ("out", c_void_p),
        ("numel", c_int64),
        ("dtype", c_int32),
        ("fmt", c_int32),
        ("per_block", c_int32),
        ("streaming", c_int32),
    )


class FlatEncodeJob(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("quantized", c_void_p),
        ("scale_inv", c_void_p),
        ("numel", c_int64),
        ("dtype", c_int32),
        ("fmt", c_int32),
        ("stochastic", c_int32),
        ("key", c_uint32),
        ("first", c_uint32),
        ("best_of_two", c_int32),
    )


class FlatSumJob(ctypes.Structure):
    _fields_ = (
        ("own", c_void_p),
        ("quantized", c_void_p),
        ("scale_inv", c_void_p),
        ("out", c_void_p),
        ("quantized_out", c_void_p),
        ("out_scale_inv", c_void_p),
        ("quantized_stride", c_int64),
        ("scale_stride", c_int64),
        ("numel", c_int64),
        ("contributions", c_int64),
        ("dtype", c_int32),
        ("fmt", c_int32),
        ("factor", c_float),
        ("out_fmt", c_int32),
        ("own_dtype", c_int32),
        ("best_of_two", c_int32),
    )


class TileJob(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("quantized", c_void_p),
        ("scale_inv", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("tile_rows", c_int64),
        ("dtype", c_int32),
        ("fmt", c_int32),
        ("power_of_two", c_int32),
        ("unused", c_int32),
    )


class State(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scale_inv", c_void_p),
        ("expansion", c_void_p),
        ("format", c_int32),
        ("key", c_uint32),
    )


class AdamJob(ctypes.Structure):
    _fields_ = (
        ("param", c_void_p),
        ("grad", c_void_p),
        ("grad_scale", c_void_p),
        ("exp_avg", State),
        ("exp_avg_sq", State),
        ("master", State),
        ("expansion_table", c_void_p),
        ("torch_sqrt", c_void_p),
        ("torch_sqrt_mode", c_int64),
        ("numel", c_int64),
        ("param_dtype", c_int32),
        ("grad_dtype", c_int32),
        ("stochastic", c_int32),
        *((name, c_float) for name in ADAM_SCALARS),
        ("divides", c_int32),
        ("unused", c_int32),
    )


def address(tensor: torch.Tensor | None) -> int | None:
    """Where the elements begin; None is C's null."""
    return None if tensor is None else tensor.data_ptr()


def format_number(fmt: Format) -> int:
    return FORMATS[fmt.name]
