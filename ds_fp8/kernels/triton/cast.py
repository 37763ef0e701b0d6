"""Casts of activations, weights and gradients on a GPU: one pass reads the tensor, measures it and writes the quantized
values.

Hopper multiplies FP8 only as row-major by column-major, so dgrad wants the quantized weight transposed and wgrad that
of grad_output and input: operands.py writes both from one read; `turn` transposes what is quantized already. The amax
is left in the caller's slot by an atomic maximum of the magnitude's bits, which order like the magnitudes: no second
pass, nothing on the host.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...formats import Format
from . import codec
from .launch import LAUNCH, Launch, hardware_casts, kind, on_device

ELEMENTS = 2048
TILE = 64


@triton.jit
def raise_slot(amax_ptr, bits):
    """fp32 slot becomes the larger of itself and the magnitude with these bits (int32, ordered like the magnitudes).

    NaN is carried as inf: an all-reduce with MAX ignores NaN. A look first, because most tiles hold no new maximum and
    atomics on one address queue up; a stale look only costs an atomic.
    """
    slot = amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    largest = tl.minimum(bits, 0x7F800000)
    tl.atomic_max(slot, largest, mask=largest > tl.load(slot, cache_modifier=".cg"))


@triton.jit
def _quantize_kernel(x_ptr, scale_ptr, quantized_ptr, amax_ptr, n, FMT: tl.constexpr, MEASURE: tl.constexpr,
                     ELEMENTS: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = index < n
    x = codec.load(x_ptr + index, inside)
    tl.store(quantized_ptr + index, codec.encode(x * tl.load(scale_ptr), FMT, HARDWARE), mask=inside)
    if MEASURE:
        raise_slot(amax_ptr, tl.max(codec.magnitude_bits(x), axis=0))


@triton.jit
def _turn_kernel(source_ptr, target_ptr, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    matrix = tl.program_id(2).to(tl.int64) * rows * columns
    source = matrix + column[:, None] * rows + row[None, :]
    quantized = tl.load(source_ptr + source, mask=(column[:, None] < columns) & (row[None, :] < rows), other=0)
    target = matrix + row[:, None] * columns + column[None, :]
    tl.store(target_ptr + target, tl.trans(quantized), mask=(row[:, None] < rows) & (column[None, :] < columns))


@triton.jit
def _amax_kernel(x_ptr, amax_ptr, n, ELEMENTS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = codec.load(x_ptr + index, index < n)
    raise_slot(amax_ptr, tl.max(codec.magnitude_bits(x), axis=0))


def _slot(amax: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """The amax slot; any pointer when nothing is measured."""
    return scale if amax is None else amax


def quantize(x: torch.Tensor, scale: torch.Tensor, fmt: Format, quantized: torch.Tensor,
             amax: torch.Tensor | None = None) -> None:  # fmt: skip
    """Fill `quantized` (uint8 or float8, the shape of contiguous `x`) with sat(x * scale); raise `amax` to the amax of
    x.

    scale   fp32, one element, on the device
    amax    fp32, one element: becomes max(amax, amax of x); None measures nothing
    """
    n = x.numel()
    if n:
        with on_device(x):
            _quantize_kernel[(triton.cdiv(n, ELEMENTS),)](
                x, scale, quantized.view(torch.uint8), _slot(amax, scale), n,
                codec.MODES[fmt.name], amax is not None, ELEMENTS, hardware_casts(x), **LAUNCH,
            )  # fmt: skip


def turn(quantized: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out` [R, C], dense by rows, from `quantized` [R, C] (uint8 or float8) that lie dense by columns; or some
    such matrices, [matrices, R, C], in one launch.

    A tile goes through shared memory, so both sides are read and written in whole lines; torch's copy of single bytes
    across strides is not.
    """
    rows, columns = quantized.shape[-2:]
    if quantized.numel():
        matrices = quantized.shape[0] if quantized.dim() == 3 else 1
        source, target = quantized.view(torch.uint8), out.view(torch.uint8)
        launch = _turn_launch(source.data_ptr() % 16 == 0, target.data_ptr() % 16 == 0, kind(rows), kind(columns))
        launch((-(-rows // TILE), -(-columns // TILE), matrices), (source, target), rows, columns)


@functools.cache
def _turn_launch(source_aligned: bool, target_aligned: bool, rows: int, columns: int) -> Launch:
    """The launch for one set of everything by which Triton compiles another kernel."""
    return Launch(_turn_kernel, (TILE,))


def raise_amax(x: torch.Tensor, amax: torch.Tensor) -> None:
    """`amax` [1] fp32 becomes max(amax, largest |x|); inf and NaN count as inf."""
    n = x.numel()
    if n:
        with on_device(x):
            _amax_kernel[(triton.cdiv(n, ELEMENTS),)](x, amax, n, ELEMENTS, **LAUNCH)
