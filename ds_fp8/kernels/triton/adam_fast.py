"""The fast path of the Adam step: tiles in which nothing is zero, infinite, NaN or of an extreme exponent.

The general step (adam.py) is right for every tile and slow where it has to look: at each root and quotient for its
exponents, at each rounding for NaN, at each code for zero. On a GPU such looks are half of its instructions, and
instructions are what a step with quantized states waits for: the device moves the bytes of one element in the time of
some 70. So a tile is computed once without them, one look at all its exponents tells whether that was right, and what
follows then needs no case; else nothing is stored, and the general step does the tile. Both give the same bits.

    in range    sqrt(v) in [2^-50, 2^10), |m| in [2^-95, 2^25), |w| < 2^113
    hence       the root that is read again lies in [2^-51, 2^11): a zero code of a nonzero root is the smallest code,
                and its block's amax is less than 2^10; no quotient leaves 2^-120 .. 2^120 (ieee.py)

A block of 128 elements lies in 16 threads of a warp, so its amaxes need shuffles and no barrier; the look at a tile of
two warps is the only one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codec, ieee, masters, states

MOMENTS, ROOTS, MASTERS = ("int8", "e4m3"), ("fp16", "e4m3"), ("split24", "split32", "fp16", "fp32")
"""Formats of exp_avg, exp_avg_sq and master that have the fast path; a split master on a bf16 parameter."""

BELOW = tl.constexpr(0x78000000)  # 120 binades in doubled bits; as fp32 bits 2^113


@triton.jit
def scales(amax, FMAX: tl.constexpr, HARDWARE: tl.constexpr):
    """(scale, scale_inv) of blocks from their finite amax, the rule of `numerics.flat`."""
    if HARDWARE:
        if FMAX == 32768.0:
            scale_inv = amax * 0.000030517578125
        else:
            scale_inv = codec.quotient(amax, tl.zeros_like(amax) + FMAX, tl.zeros_like(amax) + 1.0 / FMAX)
        scale_inv = tl.maximum(scale_inv, 1.1754943508222875e-38)
        scale = codec.quotient(1.0 + tl.zeros_like(amax), scale_inv, codec.reciprocal(scale_inv))
    else:
        scale_inv = tl.maximum(tl.div_rn(amax, FMAX + tl.zeros_like(amax)), 1.1754943508222875e-38)
        scale = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale_inv)
    return scale, scale_inv


@triton.jit
def _quotient(a, b, HARDWARE: tl.constexpr):
    """a / b rounded to nearest, exponents in range."""
    if HARDWARE:
        result = codec.quotient(a, b, codec.reciprocal(b))
    else:
        result = tl.div_rn(a, b)
    return result


@triton.jit
def _doubled(x):
    """Bits of |x|, doubled."""
    return x.to(tl.int32, bitcast=True) << 1


@triton.jit
def _write_root(data_ptr, scale_inv_ptr, root, index, row, word, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr,
                HARDWARE: tl.constexpr):  # fmt: skip
    """Store positive `root`, never as zero; returns what a read will give."""
    amax = tl.max(root, axis=1)
    if FORMAT == states.FP16:
        scale, scale_inv = scales(amax, 32768.0, HARDWARE)
        quantized = states.round_finite_fp16(root * scale[:, None], word, STOCHASTIC)
        quantized = tl.maximum(quantized, tl.full(quantized.shape, 1, tl.int16))
        tl.store(data_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index, quantized)
        kept = states.fp16_value(quantized) * scale_inv[:, None]
    else:
        scale, scale_inv = scales(amax, 448.0, HARDWARE)
        if STOCHASTIC:
            quantized = codec.encode_stochastic(root * scale[:, None], word, 0)
        else:
            quantized = codec.encode(root * scale[:, None], 0, HARDWARE)
        quantized = tl.maximum(quantized, tl.full(quantized.shape, 1, tl.uint8))
        tl.store(data_ptr + index, quantized)
        kept = codec.value_of(quantized, 0, HARDWARE) * scale_inv[:, None]
    tl.store(scale_inv_ptr + row, scale_inv)
    return kept


@triton.jit
def _write_moment(data_ptr, scale_inv_ptr, x, index, row, word, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr,
                  HARDWARE: tl.constexpr):  # fmt: skip
    """Store finite `x`."""
    amax = tl.max(tl.abs(x), axis=1)
    if FORMAT == states.INT8:
        scale, scale_inv = scales(amax, 127.0, HARDWARE)
        quantized = states.round_int8(x * scale[:, None], word, STOCHASTIC)
    else:
        scale, scale_inv = scales(amax, 448.0, HARDWARE)
        if STOCHASTIC:
            quantized = codec.encode_stochastic(x * scale[:, None], word, 0)
        else:
            quantized = codec.encode(x * scale[:, None], 0, HARDWARE)
    tl.store(data_ptr + index, quantized)
    tl.store(scale_inv_ptr + row, scale_inv)


@triton.jit
def _write_master(param_ptr, data_ptr, scale_inv_ptr, w, index, row, word, KIND: tl.constexpr, STOCHASTIC: tl.constexpr,
                  HARDWARE: tl.constexpr):  # fmt: skip
    """Store finite `w` as master and parameter."""
    half_ptr = param_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index
    bits = w.to(tl.int32, bitcast=True)
    if KIND == masters.FP32:
        tl.store(data_ptr + index, w)
        codec.store_finite(param_ptr + index, w, HARDWARE)
    elif KIND == masters.FP16:
        scale, scale_inv = scales(tl.max(tl.abs(w), axis=1), 32768.0, HARDWARE)
        quantized = states.round_finite_fp16(w * scale[:, None], word, STOCHASTIC)
        tl.store(data_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index, quantized)
        tl.store(scale_inv_ptr + row, scale_inv)
        codec.store_finite(param_ptr + index, states.fp16_value(quantized) * scale_inv[:, None], HARDWARE)
    elif KIND == masters.SPLIT32:
        tl.store(half_ptr, ((bits + 0x8000) >> 16).to(tl.int16))
        tl.store(data_ptr + index, bits.to(tl.int16))
    else:
        if STOCHASTIC:
            bits = bits + (word >> 24).to(tl.int32)
        else:
            bits = bits + 0x80
        # Rounded down to 24 bits and half up to 16 in one: the low byte never carries.
        tl.store(half_ptr, ((bits + 0x8000) >> 16).to(tl.int16))
        tl.store(data_ptr + index, (bits >> 8).to(tl.int8))


@triton.jit
def step(param_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, master_ptr, master_scale_ptr, g, w, m, v, index, row, begin,
         decay, l2, beta2, lerp_weight, one_minus_beta2, correction, eps, step_size, key, M_FORMAT: tl.constexpr,
         V_FORMAT: tl.constexpr, MASTER: tl.constexpr, DECAY: tl.constexpr, L2: tl.constexpr, LERP_SMALL: tl.constexpr,
         STOCHASTIC: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """A whole tile of gradient, master and states as they were read: stores the new ones and returns True, or
    returns False.
    """
    one = tl.full(g.shape, 1.0, tl.float32)
    m = m * states.divisor(v, True)
    v = v * v
    if DECAY:
        w = w * decay
    if L2:
        g = codec.fma(one * l2, w, g)
    if LERP_SMALL:
        m = codec.fma(one * lerp_weight, g - m, m)
    else:
        m = codec.fma(one * lerp_weight, g - m, g)
    v = codec.fma(g * one_minus_beta2, g, v * beta2)
    if HARDWARE:
        root = ieee.root(v)
    else:
        root = tl.sqrt_rn(v)
    change = _quotient(m, codec.fma(one * correction, root, one * eps), HARDWARE)
    w = codec.fma(one * step_size, change, w)

    # What lies below a range wraps around to the top.
    v_above = (_doubled(v) - 2 * ieee.LEAST_ROOT).to(tl.uint32, bitcast=True)
    m_above = (_doubled(m) - 2 * ieee.LEAST_NUMERATOR).to(tl.uint32, bitcast=True)
    above = tl.maximum(tl.maximum(v_above, m_above), codec.magnitude_bits(w).to(tl.uint32, bitcast=True))
    fine = tl.max(tl.max(above, axis=1), axis=0) < BELOW
    if fine:
        word_m, word_v, word_w = index, index, index  # not used when rounding to nearest
        if STOCHASTIC:
            word = codec.random_words(begin + index, key)
            word_m, word_v, word_w = word << states.SHIFT_M, word << states.SHIFT_V, word << states.SHIFT_W
        kept = _write_root(v_ptr, v_scale_ptr, root, index, row, word_v, V_FORMAT, STOCHASTIC, HARDWARE)
        ratio = _quotient(m, kept, HARDWARE)
        _write_moment(m_ptr, m_scale_ptr, ratio, index, row, word_m, M_FORMAT, STOCHASTIC, HARDWARE)
        _write_master(param_ptr, master_ptr, master_scale_ptr, w, index, row, word_w, MASTER, STOCHASTIC, HARDWARE)
    return fine
