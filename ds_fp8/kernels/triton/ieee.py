"""Square root and quotients of the Adam step, rounded as IEEE asks, without a branch per element.

`tl.sqrt_rn` and `tl.div_rn` compile to a short sequence, right for normal exponents, and a call for the others. The
calls keep the elements of a thread from overlapping, and the step then waits for arithmetic instead of memory. Here the
short sequences stand alone (an approximation, then corrections by fused multiply-add whose residuals are exact), and
one look at the whole tile says whether all its exponents are normal; if not, the tile takes the slow path.

    root    x in [2^-101, 2^128): r = rsqrt(x), g = x r, g + (x - g^2) r / 2
    quotient  r = 1 / b corrected once, q = a r corrected twice by its residual a - q b
These are the sequences that CUDA's own compiler emits; `tests/gpu` compares every byte of whole steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codec

LEAST_ROOT, LEAST_NUMERATOR = tl.constexpr(0x0D800000), tl.constexpr(0x10000000)  # bits of 2^-100 and 2^-95
SPAN = tl.constexpr(0x3C000000)  # 120 binades, in bits


def has_normal_exponents(eps: float, bias_correction2_sqrt: float) -> bool:
    """Whether, for `v` and numerators within the span, no denominator and no quotient leaves the normal exponents.

    v in [2^-100, 2^20): root in [2^-50, 2^10), denominator in [2^-50, 2^25); numerator in [2^-95, 2^25): the quotient
    stays above 2^-120, and the residuals (47 bits further down) are exact as subnormals.
    """
    return 0.0 <= eps <= 1024.0 and 2.0**-14 <= bias_correction2_sqrt <= 1.0


@triton.jit
def root(x):
    """sqrt(x) rounded to nearest, for normal exponents."""
    r = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    g = x * r
    return tl.fma(tl.fma(codec.minus(g), g, x), r * 0.5, g)


@triton.jit
def root_and_change(v, numerator, correction, eps, DIVIDES: tl.constexpr):
    """(sqrt(v), numerator / d), each operation rounded to nearest.

    d is sqrt(v) / correction + eps, or, if it is not divided, fma(correction, sqrt(v), eps).
    """
    b = tl.zeros_like(v) + correction
    found = root(v)
    if DIVIDES:
        denominator = codec.quotient(found, b, codec.reciprocal(b)) + eps
    else:
        denominator = tl.fma(b, found, tl.zeros_like(v) + eps)
    change = codec.quotient(numerator, denominator, codec.reciprocal(denominator))
    # One unsigned maximum: what lies below the span wraps around to the top. Zeros do, too; they are rare, or whole
    # tiles.
    v_above = (v.to(tl.int32, bitcast=True) - LEAST_ROOT).to(tl.uint32, bitcast=True)
    above = (codec.magnitude_bits(numerator) - LEAST_NUMERATOR).to(tl.uint32, bitcast=True)
    if tl.max(tl.max(tl.maximum(v_above, above), axis=1), axis=0) >= SPAN:
        found = tl.sqrt_rn(v)
        if DIVIDES:
            change = tl.div_rn(numerator, tl.div_rn(found, b) + eps)
        else:
            change = tl.div_rn(numerator, tl.fma(b, found, tl.zeros_like(v) + eps))
    return found, change


@triton.jit
def ratio(a, b):
    """a / b rounded to nearest, b > 0: short where both lie in [2^-95, 2^25), the quotient then in 2^-120 to 2^120."""
    quotient = codec.quotient(a, b, codec.reciprocal(b))
    a_above = (codec.magnitude_bits(a) - LEAST_NUMERATOR).to(tl.uint32, bitcast=True)
    b_above = (b.to(tl.int32, bitcast=True) - LEAST_NUMERATOR).to(tl.uint32, bitcast=True)
    if tl.max(tl.max(tl.maximum(a_above, b_above), axis=1), axis=0) >= SPAN:
        quotient = tl.div_rn(a, b)
    return quotient
