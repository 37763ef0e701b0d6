"""Reading and writing a master inside a kernel: the Triton counterpart of `numerics.masters`.

The bits of a master in 32-bit integers, whose wrapping is what the formulas ask for; the bf16 half and the remainder
are simply its upper and lower bits after rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import levels
from . import codec
from .states import fp16_value, round_fp16

KINDS = {levels.OWN: 0} | {name: fmt.triton for name, fmt in levels.MASTERS.items() if fmt.triton is not None}
"""MasterStorage.format -> the constexpr KIND."""

OWN, FP32, SPLIT32, SPLIT24, FP16 = (
    tl.constexpr(KINDS[name]) for name in (levels.OWN, "fp32", "split32", "split24", "fp16")
)


@triton.jit
def _unit(weight_bits, KIND: tl.constexpr):
    """ulp of the fp16 weight times 2^-15 (split32) or 2^-7 (split24), as fp32."""
    field = tl.maximum((weight_bits.to(tl.int32) >> 10) & 0x1F, 1)
    shift = 15 if KIND == SPLIT32 else 7
    return ((field - 25 - shift + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def read(param_ptr, data_ptr, scale_inv_ptr, index, row, inside, row_inside, KIND: tl.constexpr, HALF: tl.constexpr):
    """The master as fp32. HALF: the parameter is fp16, else bf16 (for the split kinds)."""
    if KIND == OWN:
        value = codec.load(param_ptr + index, inside)
    elif KIND == FP32:
        value = codec.load(data_ptr + index, inside)
    elif KIND == FP16:
        scale_inv = tl.load(scale_inv_ptr + row, mask=row_inside, other=1.0)
        raw = tl.load(data_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index, mask=inside, other=0)
        value = fp16_value(raw) * scale_inv[:, None]
    else:
        weight = tl.load(param_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index, mask=inside, other=0)
        extra = tl.load(data_ptr + index, mask=inside, other=0).to(tl.int32)
        if HALF:
            value = fp16_value(weight) + extra.to(tl.float32) * _unit(weight, KIND)
        else:
            high = weight.to(tl.int32) << 16
            joined = (high + (extra if KIND == SPLIT32 else extra << 8)).to(tl.float32, bitcast=True)
            # A zero written in place, beside the negative remainder of what was there, would be NaN.
            value = tl.where(joined == joined, joined, high.to(tl.float32, bitcast=True))
    return value


@triton.jit
def write(param_ptr, data_ptr, scale_inv_ptr, w, index, row, inside, row_inside, word, KIND: tl.constexpr,
          HALF: tl.constexpr, STOCHASTIC: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """Store fp32 `w` as master and parameter."""
    half_ptr = param_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index
    if KIND == OWN:
        tl.store(param_ptr + index, w, mask=inside)
    elif KIND == FP32:
        tl.store(data_ptr + index, w, mask=inside)
        codec.store(param_ptr + index, w, inside)
    elif KIND == FP16:
        scale, scale_inv = codec.block_scale(w, 32768.0, 1, HARDWARE)
        bits = round_fp16(w * scale[:, None], (scale_inv != scale_inv)[:, None], word, STOCHASTIC)
        tl.store(data_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index, bits, mask=inside)
        tl.store(scale_inv_ptr + row, scale_inv, mask=row_inside)
        codec.store(param_ptr + index, fp16_value(bits) * scale_inv[:, None], inside)
    elif HALF:
        weight = round_fp16(w, w != w, word, False)
        infinite = (weight.to(tl.int32) & 0x7C00) == 0x7C00
        unit = _unit(weight, KIND)
        quotient = (w - fp16_value(weight)) * tl.div_rn(tl.full(w.shape, 1.0, tl.float32), unit)
        quotient = tl.where(infinite, 0.0, quotient)
        if STOCHASTIC and KIND == SPLIT24:
            remainder = tl.floor(quotient + (word >> 8).to(tl.int32).to(tl.float32) * 5.960464477539063e-08)
        else:
            remainder = (quotient + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
        remainder = tl.where(infinite, 0.0, remainder).to(tl.int32)
        tl.store(half_ptr, weight, mask=inside)
        tl.store(data_ptr + index, remainder.to(data_ptr.dtype.element_ty), mask=inside)
    else:
        bits = tl.where(w != w, 0x7FC00000, w.to(tl.int32, bitcast=True))
        if KIND == SPLIT32:
            tl.store(half_ptr, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
            tl.store(data_ptr + index, bits.to(tl.int16), mask=inside)
        else:
            if STOCHASTIC:
                carry = (word >> 24).to(tl.int32)
            else:
                carry = 0x80
            bits = bits + tl.where((bits & 0x7FFFFFFF) < 0x7F800000, carry, 0)
            upper = bits >> 8
            tl.store(half_ptr, ((upper + 0x80) >> 8).to(tl.int16), mask=inside)
            tl.store(data_ptr + index, upper.to(tl.int8), mask=inside)
