"""Square root and quotients of the Adam step, rounded as IEEE asks, without a branch per element.

`tl.sqrt_rn` and `tl.div_rn` compile to a short sequence, right for ordinary exponents, and a call for the others. The calls
keep the elements of a thread from overlapping, and the step then waits for arithmetic instead of memory. Here the short
sequences stand alone (an approximation, then corrections by fused multiply-add whose residuals are exact), and one look
at the whole tile says whether all its exponents are ordinary; if not, the tile takes the long way.

    root    x in [2^-101, 2^128): r = rsqrt(x), g = x r, g + (x - g^2) r / 2
    quotient  r = 1 / b corrected once, q = a r corrected twice by its residual a - q b
These are the sequences that CUDA's own compiler emits; `tests/gpu` compares every byte of whole steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codec

LEAST_ROOT = tl.constexpr(0x0D000000)  # bits of 2^-101
LEAST_NUMERATOR, MOST = tl.constexpr(0x10000000), tl.constexpr(0x5D800000)  # bits of 2^-95 and 2^60
LEAST_DENOMINATOR, MOST_DENOMINATOR = tl.constexpr(0x21800000), tl.constexpr(0x49800000)  # bits of 2^-60 and 2^20


@triton.jit
def _reciprocal(b):
    """1 / b, a bit wrong at most."""
    r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1)
    return tl.fma(tl.fma(-b, r, 1.0 + tl.zeros_like(b)), r, r)


@triton.jit
def _quotient(a, b, r):
    """a / b rounded to nearest, for ordinary exponents; `r` is about 1 / b."""
    q = a * r
    q = tl.fma(tl.fma(-b, q, a), r, q)
    q = tl.fma(tl.fma(-b, q, a), r, q)
    return tl.where(a == 0.0, a, q)  # the corrections would lose the sign of a zero


@triton.jit
def _root(x):
    """sqrt(x) rounded to nearest, for 0 and ordinary exponents."""
    r = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    g = x * r
    return tl.where(x == 0.0, 0.0, tl.fma(tl.fma(-g, g, x), r * 0.5, g))


@triton.jit
def _outside(bits, LEAST: tl.constexpr, MOST_BITS: tl.constexpr):
    """Bits of a magnitude that is neither zero nor within the bounds."""
    return (bits != 0) & ((bits < LEAST) | (bits > MOST_BITS))


@triton.jit
def root_and_change(v, numerator, bias_correction2_sqrt, eps):
    """(sqrt(v), numerator / (sqrt(v) / bias_correction2_sqrt + eps)), each operation rounded to nearest."""
    b = tl.zeros_like(v) + bias_correction2_sqrt
    root = _root(v)
    denominator = _quotient(root, b, tl.div_rn(1.0, bias_correction2_sqrt)) + eps
    change = _quotient(numerator, denominator, _reciprocal(denominator))
    v_bits, denominator_bits = v.to(tl.int32, bitcast=True), denominator.to(tl.int32, bitcast=True)
    odd = _outside(v_bits, LEAST_ROOT, 0x7F7FFFFF) | (v_bits < 0)
    odd = odd | _outside(codec.magnitude_bits(numerator), LEAST_NUMERATOR, MOST)
    odd = odd | (denominator_bits < LEAST_DENOMINATOR) | (denominator_bits > MOST_DENOMINATOR)
    if tl.max(tl.max(odd.to(tl.int32), axis=1), axis=0) > 0:
        root = tl.sqrt_rn(v)
        change = tl.div_rn(numerator, tl.div_rn(root, b) + eps)
    return root, change
