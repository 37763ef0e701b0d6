"""Reading and writing an optimizer state inside a kernel: the Triton counterpart of `numerics.states` and its codecs.

A state is a [ROWS, 128] tile, so each row is one block with one scale. FORMAT is a constexpr: the compiler keeps one
branch, and the pointers of the others are never touched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...levels import STATES
from ...numerics import expansion as _expansion
from ...numerics.random_bits import EXP_AVG_SHIFT, EXP_AVG_SQ_SHIFT, MASTER_SHIFT
from . import codec

FORMATS = {name: fmt.triton for name, fmt in STATES.items() if fmt.triton is not None}
FP32, BF16, FP16, E4M3, EXPANDED, INT8 = (
    tl.constexpr(FORMATS[name]) for name in ("fp32", "bf16", "fp16", "e4m3", "e4m3_expanded", "int8")
)
SHIFT_M, SHIFT_V, SHIFT_W = (tl.constexpr(shift) for shift in (EXP_AVG_SHIFT, EXP_AVG_SQ_SHIFT, MASTER_SHIFT))

_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (tl.constexpr(value) for value in _expansion.LOG2_COEFFICIENTS)
_X0, _X1, _X2, _X3, _X4 = (tl.constexpr(value) for value in _expansion.EXP2_COEFFICIENTS)
_SPAN = tl.constexpr(16 * _expansion.E4M3_SPAN)


@triton.jit
def round_finite_fp16(x, word, STOCHASTIC: tl.constexpr):
    """Bits (int16) of fp32 `x` as fp16, nearest even or stochastic; not for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        random = (word >> 19).to(tl.int32)
        u = bits & 0x7FFFFFFF
        normal = ((u + random) & -8192).to(tl.float32, bitcast=True)
        whole = u.to(tl.float32, bitcast=True) * 16777216.0  # grid 2^-24
        small = tl.floor(whole + random.to(tl.float32) * 0.0001220703125) * 5.960464477539063e-08
        value = tl.where(u < 0x38800000, small, normal)
        rounded = value.to(tl.float16).to(tl.int16, bitcast=True) | ((bits >> 16) & 0x8000).to(tl.int16)
    else:
        rounded = x.to(tl.float16).to(tl.int16, bitcast=True)
    return rounded


@triton.jit
def round_fp16(x, nan, word, STOCHASTIC: tl.constexpr):
    """The same, with 0x7e00 where `nan`."""
    return tl.where(nan, 0x7E00, round_finite_fp16(x, word, STOCHASTIC).to(tl.int32)).to(tl.int16)


@triton.jit
def round_int8(x, word, STOCHASTIC: tl.constexpr):
    """int8 of fp32 `x`, at most 127 but for the rounding of its scale; nearest even or stochastic; not for NaN."""
    if STOCHASTIC:
        fraction = (word >> 15).to(tl.int32).to(tl.float32) * 7.62939453125e-06  # 2^-17
        whole = (tl.minimum(tl.abs(x), 127.0) + fraction).to(tl.int32)
        rounded = tl.where(x < 0.0, -whole, whole).to(tl.int8)
    else:
        # 1.5 * 2^23: fp32's own addition rounds, and the sum's low byte is the code.
        rounded = (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return rounded


@triton.jit
def fp16_value(bits):
    """fp32 of int16 `bits` of fp16."""
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def log2(u):
    """log2 of positive normal fp32, by the operations of numerics.expansion."""
    bits = u.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    high = mantissa > 1.4142135381698608
    mantissa = tl.where(high, mantissa * 0.5, mantissa)
    f = mantissa - 1.0
    p = f * _L6 + _L5
    p = p * f + _L4
    p = p * f + _L3
    p = p * f + _L2
    p = p * f + _L1
    p = p * f + _L0
    return ((bits >> 23) - 127 + high.to(tl.int32)).to(tl.float32) + f * p


@triton.jit
def exp2(y):
    """2 ** y for y <= 0, by the operations of numerics.expansion."""
    y = tl.maximum(y, -126.0)
    whole = tl.floor(y + 0.5)
    f = y - whole
    p = f * _X4 + _X3
    p = p * f + _X2
    p = p * f + _X1
    p = p * f + _X0
    return ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True) * (f * p + 1.0)


@triton.jit
def _value(quantized, scale_inv, expansion, table_ptr, inside, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 values of the quantized values of a tile; `scale_inv` and `expansion` (int32) per block; int16 bits for
    FP16.
    """
    if FORMAT == FP16:
        value = fp16_value(quantized) * scale_inv[:, None]
    elif FORMAT == E4M3:
        value = codec.value_of(quantized, 0, HARDWARE) * scale_inv[:, None]
    elif FORMAT == INT8:
        value = quantized.to(tl.float32) * scale_inv[:, None]
    else:
        entry = expansion[:, None] * 128 + (quantized & 0x7F).to(tl.int32)
        magnitude = tl.load(table_ptr + entry, mask=inside, other=0.0) * scale_inv[:, None]
        sign = (quantized & 0x80).to(tl.int32) << 24
        value = (magnitude.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return value


@triton.jit
def read(data_ptr, scale_inv_ptr, expansion_ptr, table_ptr, index, row, inside, row_inside, FORMAT: tl.constexpr,
         HARDWARE: tl.constexpr):  # fmt: skip
    """fp32 values of a state; `row` are the block numbers, with the mask `row_inside`."""
    if FORMAT == FP32 or FORMAT == BF16:  # noqa: SIM109 - the compiler knows no `in` for constants
        value = codec.load(data_ptr + index, inside)
    else:
        scale_inv = tl.load(scale_inv_ptr + row, mask=row_inside, other=1.0)
        expansion = row
        if FORMAT == FP16:
            quantized = tl.load(data_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index, mask=inside, other=0)
        else:
            quantized = tl.load(data_ptr + index, mask=inside, other=0)
            if FORMAT == EXPANDED:
                expansion = tl.load(expansion_ptr + row, mask=row_inside, other=255).to(tl.int32)
        value = _value(quantized, scale_inv, expansion, table_ptr, inside, FORMAT, HARDWARE)
    return value


@triton.jit
def divisor(stored, ROOT: tl.constexpr):
    """What exp_avg is divided by where it is a ratio, from what exp_avg_sq reads: its root, or 1 where that is zero."""
    root = stored
    if not ROOT:
        root = tl.sqrt_rn(stored)
    return tl.where(root == 0.0, 1.0, root)


@triton.jit
def _expanded(x, scale, scale_inv, inside):
    """(magnitudes to be quantized in e4m3, expansion per block) of `x`; see numerics.expansion."""
    finite = scale_inv == scale_inv
    a = tl.minimum(tl.abs(x) * scale[:, None], 448.0)
    u = tl.div_rn(a, tl.full(a.shape, 448.0, tl.float32))
    zero = u < 1.1754943508222875e-38
    logs = log2(tl.maximum(u, 1.1754943508222875e-38))
    span = -tl.min(tl.where(zero | (inside == 0), 0.0, logs), axis=1)
    wanted = tl.div_rn(tl.full(span.shape, _SPAN, tl.float32), span)
    wanted = tl.where(finite, tl.where(span == 0.0, 255.0, wanted), 16.0)
    expansion = tl.floor(tl.minimum(tl.maximum(wanted, 16.0), 255.0))
    magnitude = exp2(logs * (expansion * 0.0625)[:, None]) * 448.0
    magnitude = tl.where(zero, 0.0, magnitude)
    return tl.where(finite[:, None], magnitude, float("nan")), expansion.to(tl.uint8)


@triton.jit
def write(data_ptr, scale_inv_ptr, expansion_ptr, table_ptr, x, index, row, inside, row_inside, word,
          FORMAT: tl.constexpr, ROOT: tl.constexpr, STOCHASTIC: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """Store fp32 `x`; ROOT: a zero code of a nonzero value becomes the smallest code. Returns what a read will give."""
    if FORMAT == FP32:
        tl.store(data_ptr + index, x, mask=inside)
        kept = x
    elif FORMAT == BF16:
        bits = x.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            # Not finite stays; the added bits would turn an infinity into NaN.
            finite = (bits & 0x7FFFFFFF) < 0x7F800000
            bits = tl.where(finite, bits + (word >> 16).to(tl.int32), bits) & -65536
            bits = tl.where(finite, bits, x.to(tl.int32, bitcast=True))
        value = bits.to(tl.float32, bitcast=True)
        codec.store(data_ptr + index, value, inside)
        kept = (codec.bf16_bits(value) << 16).to(tl.float32, bitcast=True)
    else:
        expansion = row
        if FORMAT == FP16:
            scale, scale_inv = codec.block_scale(x, 32768.0, 1, HARDWARE)
            quantized = round_fp16(x * scale[:, None], (scale_inv != scale_inv)[:, None], word, STOCHASTIC)
            if ROOT:
                quantized = tl.where((quantized == 0) & (x > 0.0), 1, quantized.to(tl.int32)).to(tl.int16)
            tl.store(data_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index, quantized, mask=inside)
        elif FORMAT == INT8:
            scale, scale_inv = codec.block_scale(x, 127.0, 1, HARDWARE)
            overflowed = (scale_inv != scale_inv)[:, None]
            quantized = round_int8(tl.where(overflowed, 0.0, x * scale[:, None]), word, STOCHASTIC)
            quantized = tl.where(overflowed, 127, quantized.to(tl.int32)).to(tl.int8)
            tl.store(data_ptr + index, quantized, mask=inside)
        else:
            scale, scale_inv = codec.block_scale(x, 448.0, 1, HARDWARE)
            if FORMAT == EXPANDED:
                magnitude, sixteenths = _expanded(x, scale, scale_inv, inside)
                tl.store(expansion_ptr + row, sixteenths, mask=row_inside)
                expansion = sixteenths.to(tl.int32)
                sign = x.to(tl.int32, bitcast=True) & -2147483648
                scaled = (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            else:
                scaled = x * scale[:, None]
            if STOCHASTIC:
                quantized = codec.encode_stochastic(scaled, word, 0)
            else:
                quantized = codec.encode(scaled, 0, HARDWARE)
            if ROOT:
                quantized = tl.where((quantized == 0) & (x > 0.0), 1, quantized.to(tl.int32)).to(tl.uint8)
            tl.store(data_ptr + index, quantized, mask=inside)
        tl.store(scale_inv_ptr + row, scale_inv, mask=row_inside)
        kept = _value(quantized, scale_inv, expansion, table_ptr, inside, FORMAT, HARDWARE)
    return kept
