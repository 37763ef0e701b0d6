"""FP8 values inside Triton kernels, by integer arithmetic.

Triton's interpreter runs kernels on a CPU, but its FP8 casts are wrong there (6.8 % of the e4m3 values, NaN and inf
too). With integers the same source gives the same bits in the interpreter and on a GPU, so CI checks what the GPU runs.
The hardware cast (`HARDWARE=True`) is faster by a few instructions and is compared with this one on the device.

Encode, for |a| <= fmt.max:
    normal      round the fp32 mantissa to MANT bits: add half an ulp minus one plus the last kept bit, shift right
    subnormal   a + 2^(23 - s), with 2^-s the smallest code: fp32's own addition rounds to the fixed-point grid
Both give consecutive integers, and where they meet they agree: the first normal is one above the last subnormal.
Stochastic rounding adds random bits in place of the half ulp and truncates, on the same two grids.
Decode: the code's exponent and mantissa, shifted to fp32's, times the difference of the biases: subnormals come right
by themselves. NaN is 0x7F in both; e5m2 has inf at 0x7C.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)

MODES = {"e4m3": 0, "e5m2": 1}
"""Format -> the constexpr FMT of the kernels."""


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as int32: ordered like the magnitudes, with inf and NaN above all finite ones."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(y, FMT: tl.constexpr, HARDWARE: tl.constexpr):
    """uint8 values of fp32 `y`, rounded to nearest even; too large and infinite saturate, NaN is 0x7F."""
    if HARDWARE:
        # One instruction for two values; it saturates and has the same NaN (tests/gpu looks at every case).
        if FMT == 0:
            hardware = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            hardware = y.to(tl.float8e5).to(tl.uint8, bitcast=True)
        return hardware
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    u = bits & 0x7FFFFFFF
    nan = u > 0x7F800000
    if FMT == 0:
        u = tl.minimum(u, 0x43E00000)  # 448
        normal = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - 960  # (127 - 7) << 3
        small = (u.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # grid 2^-9
        code = tl.where(u < 0x3C800000, small, normal) | sign  # 2^-6
    else:
        u = tl.minimum(u, 0x47600000)  # 57344
        normal = ((u + 0xFFFFF + ((u >> 21) & 1)) >> 21) - 448  # (127 - 15) << 2
        small = (u.to(tl.float32, bitcast=True) + 128.0).to(tl.int32, bitcast=True) - 0x43000000  # grid 2^-16
        code = tl.where(u < 0x38800000, small, normal) | sign  # 2^-14
    return tl.where(nan, 0x7F, code).to(tl.uint8)


@triton.jit
def encode_stochastic(y, word, FMT: tl.constexpr):
    """uint8 values of fp32 `y`, rounded up with the probability of the fraction passed; `word` uint32 random bits.

    Normals: the top bits of `word` are added below the kept mantissa. Subnormals: to the fraction, on the fixed grid.
    """
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    u = bits & 0x7FFFFFFF
    nan = u > 0x7F800000
    if FMT == 0:
        u = tl.minimum(u, 0x43E00000)
        random = (word >> 12).to(tl.int32)
        normal = ((u + random) >> 20) - 960
        whole = u.to(tl.float32, bitcast=True) * 512.0
        small = (whole + random.to(tl.float32) * 9.5367431640625e-07).to(tl.int32)  # 2^-20
        code = tl.where(u < 0x3C800000, small, normal)
    else:
        u = tl.minimum(u, 0x47600000)
        random = (word >> 11).to(tl.int32)
        normal = ((u + random) >> 21) - 448
        whole = u.to(tl.float32, bitcast=True) * 65536.0
        small = (whole + random.to(tl.float32) * 4.76837158203125e-07).to(tl.int32)  # 2^-21
        code = tl.where(u < 0x38800000, small, normal)
    return tl.where(nan, 0x7F, code | sign).to(tl.uint8)


@triton.jit
def decode(quantized, FMT: tl.constexpr):
    """fp32 values of uint8 values, exact."""
    c = quantized.to(tl.int32)
    u = c & 0x7F
    sign = (c & 0x80) << 24
    if FMT == 0:
        value = (u << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        bits = tl.where(u == 0x7F, 0x7FC00000, value.to(tl.int32, bitcast=True))
    else:
        value = (u << 21).to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2^112
        bits = tl.where(u < 0x7C, value.to(tl.int32, bitcast=True), tl.where(u == 0x7C, 0x7F800000, 0x7FC00000))
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def value_of(quantized, FMT: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 values of uint8 values, by the device's own conversion where it has one: exact both ways."""
    if HARDWARE:
        if FMT == 0:
            value = quantized.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            value = quantized.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        value = decode(quantized, FMT)
    return value


@triton.jit
def bf16_bits(x):
    """Bits of fp32 `x` as bf16, nearest even, as int32; the interpreter's own cast truncates."""
    u = x.to(tl.int32, bitcast=True)
    nearest = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, ((u >> 16) & 0x8000) | 0x7FC0, nearest) & 0xFFFF


@triton.jit
def load(pointer, mask):
    """fp32 values of fp32, bf16 or fp16 data, 0 outside `mask`; the interpreter's own bf16 cast loses subnormals."""
    if pointer.dtype.element_ty == tl.bfloat16:
        raw = tl.load(pointer.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0)
        value = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def store(pointer, x, mask):
    """Store fp32 `x` in the pointer's dtype (fp32, bf16 or fp16), rounded to nearest even."""
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer.to(tl.pointer_type(tl.int16), bitcast=True), bf16_bits(x).to(tl.int16), mask=mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_finite(pointer, x, HARDWARE: tl.constexpr):
    """The same for finite `x`, by the device's own rounding to bf16."""
    if pointer.dtype.element_ty == tl.bfloat16:
        if HARDWARE:
            tl.store(pointer, x.to(tl.bfloat16))
        else:
            tl.store(pointer.to(tl.pointer_type(tl.int16), bitcast=True), bf16_bits(x).to(tl.int16))
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty))


@triton.jit
def mix(h):
    """One round of the counter-based generator: a bijection of uint32 that spreads every bit."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def random_words(index, key):
    """uint32 random words of the elements `index` (modulo 2^32) under the partition's `key`."""
    return mix(index.to(tl.uint32) ^ key.to(tl.uint32, bitcast=True))


@triton.jit
def fma(a, b, c):
    """a * b + c rounded once, written out, because the compiler is told not to fuse on its own.

    The interpreter rounds twice; there it is done in fp64, whose product of two fp32 numbers is exact.
    """
    if INTERPRETED:
        result = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result


@triton.jit
def minus(x):
    """-x, as a sign that a fused multiply-add takes for nothing; Triton's own minus subtracts from zero."""
    return x * -1.0


@triton.jit
def reciprocal(b):
    """1 / b of fp32, a bit wrong at most; needs a GPU."""
    r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1)
    return tl.fma(tl.fma(minus(b), r, 1.0 + tl.zeros_like(b)), r, r)


@triton.jit
def quotient(a, b, r):
    """a / b rounded to nearest, where no residual leaves fp32's exponents; `r` is about 1 / b."""
    q = a * r
    q = tl.fma(tl.fma(minus(b), q, a), r, q)
    return tl.fma(tl.fma(minus(b), q, a), r, q)


@triton.jit
def block_scale(x, fmax: tl.constexpr, axis: tl.constexpr, HARDWARE: tl.constexpr):
    """(scale, scale_inv) of the blocks along `axis` of fp32 `x`, as `numerics.flat` has them; `fmax` is its top.

    IEEE division, because Triton's `/` is not; a block with inf or NaN gets NaN. HARDWARE: the short sequences of
    `ieee.py` do for every amax, since `fmax` has three bits and what lies below 2^-126 is raised to it.
    """
    amax_bits = tl.max(magnitude_bits(x), axis=axis)
    amax = amax_bits.to(tl.float32, bitcast=True)
    if HARDWARE:
        top = fmax + tl.zeros_like(amax)
        scale_inv = tl.maximum(quotient(amax, top, reciprocal(top)), 1.1754943508222875e-38)
        scale_inv = tl.where(amax_bits >= 0x7F800000, float("nan"), scale_inv)
        return quotient(1.0 + tl.zeros_like(amax), scale_inv, reciprocal(scale_inv)), scale_inv
    scale_inv = tl.maximum(tl.div_rn(amax, fmax + tl.zeros_like(amax)), 1.1754943508222875e-38)
    scale_inv = tl.where(amax_bits >= 0x7F800000, float("nan"), scale_inv)
    return tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale_inv), scale_inv
