// What a code of each format means: decode and encode, one vector at a time, in integer arithmetic.
//
// A small float format with MANTISSA stored bits is a ruler whose marks are 2^(e - MANTISSA) apart, e being the exponent
// of the value, and never below that of the smallest normal (there begin the subnormals). Rounding to the nearest mark,
// ties to even, is what an fp32 addition does: a + M, with M = 1.5 * 2^(e + 23 - MANTISSA), leaves the number of marks
// in the low bits of the sum. No branch, no table, no special case for subnormals.
//
// Bit-equal to torch's casts after the clamp (tests/kernels/test_cpu_codec.py, and all 2^32 inputs in
// benchmarks/bench_codec.py --exhaustive). NaN becomes 0x7f with the sign of the NaN.
#pragma once

#include "vectors.h"

namespace {

constexpr uint32_t SIGN = 0x80000000u;
constexpr uint32_t MAGNITUDE = 0x7fffffffu;
constexpr uint32_t INFINITE = 0x7f800000u;

// The code of |x| without sign, in the low bits of each lane; what stands above them is noise. `magnitude` holds the bits
// of |x|, finite and within the format. The exponent's share of the code, (exponent >> ...) less that of the smallest
// normal, is added in two parts: the constant hides in the low bits of M, where it costs nothing.
// `rounded` becomes the value of the code.
template <int MANTISSA, int BIAS>
INLINE Words encode_magnitude(Words magnitude, Floats& rounded) {
    constexpr uint32_t smallest_exponent = uint32_t(128 - BIAS) << 23;
    constexpr uint32_t low_bits = MANTISSA < 8 ? 0xffu : 0xffffu;
    constexpr uint32_t constant = (0u - (uint32_t(128 - BIAS) << MANTISSA)) & low_bits;
    static_assert(constant % 2 == 0, "an odd constant would turn ties to even into ties to odd");
    Words exponent = larger(magnitude & INFINITE, splat(smallest_exponent));
    Words magic = exponent + ((uint32_t(23 - MANTISSA) << 23) + 0x400000u + constant);
    Floats sum = floats_of(magnitude) + floats_of(magic);
    rounded = sum - floats_of(magic);
    return bits_of(sum) + (exponent >> (23 - MANTISSA));
}

template <int MANTISSA, int BIAS>
INLINE Words encode_magnitude(Words magnitude) {
    Floats unused;
    return encode_magnitude<MANTISSA, BIAS>(magnitude, unused);
}

template <int MANTISSA, int BIAS>
INLINE Floats decode_magnitude(Words code) {  // finite quantized values
    constexpr uint32_t rebias = uint32_t(127 - BIAS) << 23;
    constexpr uint32_t smallest_normal = uint32_t(128 - BIAS) << 23;
    Words shifted = code << (23 - MANTISSA);
    Words subnormal = bits_of(floats_of(shifted | smallest_normal) - splat(float_of(smallest_normal)));
    return floats_of((Ints)code < (1 << MANTISSA) ? subnormal : shifted + rebias);
}

INLINE Floats half_to_float(Halves v) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)v);
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps((__m128i)v);
#else
    Words code = widen(v);
    Words magnitude = code & 0x7fffu;
    Words finite = bits_of(decode_magnitude<10, 15>(magnitude));
    Words special = (magnitude << 13) + (224u << 23);  // inf, NaN
    special = (Ints)magnitude > 0x7c00 ? special | 0x400000u : special;
    return floats_of(((Ints)magnitude >= 0x7c00 ? special : finite) | ((code & 0x8000u) << 16));
#endif
}

INLINE Halves float_to_half(Floats x) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Words magnitude = bits_of(x) & MAGNITUDE;
    // 65536 rounds to 0x7c00, infinity; everything above is brought there.
    Words code = encode_magnitude<10, 15>(smaller(magnitude, splat(0x47800000u))) & 0x7fffu;
    code = (Ints)magnitude > (Ints)splat(INFINITE) ? ((magnitude >> 13) & 0x3ffu) | 0x7e00u : code;
    return narrow_to_halves(code | ((bits_of(x) & SIGN) >> 16));
#endif
}

// ---- The 16- and 32-bit formats of tensors -------------------------------------------------------------------------

struct Fp32 {
    typedef float Type;
    static INLINE Floats read(const Type* from) { return load<Floats>(from); }
    static INLINE void write(Type* to, Floats x) { store(to, x); }
    static INLINE void write_stream(Type* to, Floats x) { stream(to, x); }
};

struct Bf16 {
    typedef uint16_t Type;
    static INLINE Floats read(const Type* from) { return floats_of(widen(load<Halves>(from)) << 16); }
    static INLINE Words encode(Floats x) {
        Words bits = bits_of(x);
        Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return (Ints)(bits & MAGNITUDE) > (Ints)splat(INFINITE) ? splat(0x7fc0u) : rounded;
    }
    static INLINE void write(Type* to, Floats x) { store(to, narrow_to_halves(encode(x))); }
    static INLINE void write_stream(Type* to, Floats x) { stream(to, narrow_to_halves(encode(x))); }
};

struct Fp16 {
    typedef uint16_t Type;
    static INLINE Floats read(const Type* from) { return half_to_float(load<Halves>(from)); }
    static INLINE void write(Type* to, Floats x) { store(to, float_to_half(x)); }
    static INLINE void write_stream(Type* to, Floats x) { stream(to, float_to_half(x)); }
};

// ---- FP8 -----------------------------------------------------------------------------------------------------------

// decode(quantized) * UNIT is the value; a caller that multiplies by a scale_inv anyway multiplies by scale_inv * UNIT.
// `finite`: there is no NaN code, or the scale_inv is NaN as well.
struct E4m3 {
    static constexpr int MANTISSA = 3, BIAS = 7;
    static constexpr uint32_t LARGEST = 0x43e00000u;  // 448
    static constexpr float MAX = 448.0f;
#if defined(__AVX512F__) || defined(__AVX2__)
    static constexpr float UNIT = 256.0f;
    // The same bits seven places up are an fp16 that is 2^8 too small. The NaN code is the one where adding one carries
    // into the sign bit: it gets the top exponent bit of fp16, which makes it an fp16 NaN.
    template <bool finite = false>
    static INLINE Floats decode(Bytes quantized) {
#if defined(__AVX512F__)
        Halves code = (Halves)_mm256_cvtepi8_epi16((__m128i)quantized);
#else
        Halves code = (Halves)_mm_cvtepi8_epi16(_mm_cvtsi64_si128((long long)quantized));
#endif
        Halves half = (code << 7) & 0xbf80;
        if (!finite) half |= ((code ^ (code + 1)) & 0x80) << 7;
        return half_to_float(half);
    }
#else
    static constexpr float UNIT = 1.0f;
    template <bool finite = false>
    static INLINE Floats decode(Bytes quantized) {
        Words code = widen(quantized);
        Words magnitude = code & 0x7fu;
        Words value = bits_of(decode_magnitude<MANTISSA, BIAS>(magnitude));
        if (!finite) value = (Ints)magnitude == 0x7f ? splat(0x7fc00000u) : value;
        return floats_of(value | ((code & 0x80u) << 24));
    }
#endif
};

// The upper byte of an fp16.
struct E5m2 {
    static constexpr int MANTISSA = 2, BIAS = 15;
    static constexpr uint32_t LARGEST = 0x47600000u;  // 57344
    static constexpr float MAX = 57344.0f;
    static constexpr float UNIT = 1.0f;
    template <bool finite = false>
    static INLINE Floats decode(Bytes quantized) {
#if defined(__AVX512F__)
        return half_to_float((Halves)_mm256_slli_epi16(_mm256_cvtepu8_epi16((__m128i)quantized), 8));
#elif defined(__AVX2__)
        return half_to_float((Halves)_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)quantized)), 8));
#else
        return half_to_float(narrow_to_halves(widen(quantized) << 8));
#endif
    }
};

// Nearest code of x, saturating (infinity too), in the lowest byte of each lane.
template <class F>
INLINE Words encode_nearest(Floats x) {
    Words bits = bits_of(x);
    Words magnitude = bits & MAGNITUDE;
    Words code = encode_magnitude<F::MANTISSA, F::BIAS>(smaller(magnitude, splat(F::LARGEST)));
    code = (Ints)magnitude > (Ints)splat(INFINITE) ? splat(0x7fu) : code;
    return code | ((bits >> 24) & 0x80u);
}

// The same for an x that is finite and, but for the rounding of a product, within the format.
template <class F>
INLINE Words encode_nearest_within(Floats x) {
    Words bits = bits_of(x);
    return encode_magnitude<F::MANTISSA, F::BIAS>(bits & MAGNITUDE) | ((bits >> 24) & 0x80u);
}

}  // namespace
