// Random bits, and rounding with them. The bits are a function of (index, seed, step, stream) and nothing else, so that
// torch, C++ and Triton draw the same ones and a resumed job draws what the uninterrupted one would have.
// Reference: ds_fp8/numerics/random_bits.py.
#pragma once

#include "blocks.h"

namespace {

INLINE Words mix(Words h) {
    h ^= h >> 16;
    h *= splat(0x7feb352du);
    h ^= h >> 15;
    h *= splat(0x846ca68bu);
    h ^= h >> 16;
    return h;
}

INLINE Words lane_numbers() {
    Words lanes = {};
    for (int i = 0; i < LANES; i++) lanes[i] = uint32_t(i);
    return lanes;
}

// Where random words come from: `key` is mix(seed ^ mix(step ^ mix(stream))), made by the caller once per job; the words
// are shifted left, so that several roundings of an element can share one.
struct Source {
    uint32_t key;
    int shift;
};
constexpr int EXP_AVG_SHIFT = 0, EXP_AVG_SQ_SHIFT = 20, MASTER_SHIFT = 12;

INLINE Words random_bits(uint32_t first_index, Source source) {
    return mix((lane_numbers() + first_index) ^ source.key) << source.shift;
}

// The upper `count` random bits as a fraction in [0, 1).
template <int count>
INLINE Floats random_fraction(Words random) {
    return __builtin_convertvector((Ints)(random >> (32 - count)), Floats) * splat(1.0f / (1 << count));
}

// |x| in marks of its ruler (see formats.h), plus a random fraction of a mark, cut to a whole number of marks: the mean
// of the result is |x|. `magnitude` holds the
// bits of |x|, finite and within the format. Returns the code without sign.
template <int MANTISSA, int BIAS>
INLINE Words encode_magnitude_stochastic(Words magnitude, Words random) {
    constexpr int dropped = 23 - MANTISSA;
    constexpr uint32_t smallest_exponent = uint32_t(128 - BIAS) << 23;
    Words exponent = larger(magnitude & INFINITE, splat(smallest_exponent));
    // 1 / mark, a power of two: 2^(MANTISSA - e).
    Words marks_per_unit = splat((uint32_t(254 + MANTISSA)) << 23) - exponent;
#if defined(__FMA__)
    Floats fraction = __builtin_convertvector((Ints)(random >> (32 - dropped)), Floats);
    Floats marks = floats_of(magnitude) * floats_of(marks_per_unit);
    marks = fma(fraction, splat(1.0f / (1 << dropped)), marks);  // an exact product: the same as to add it
#else
    Floats marks = floats_of(magnitude) * floats_of(marks_per_unit) + random_fraction<dropped>(random);
#endif
    Words whole = (Words)__builtin_convertvector(marks, Ints);  // towards zero
    return whole + (exponent >> dropped) - (uint32_t(128 - BIAS) << MANTISSA);
}

// Stochastic code of a finite x, saturating.
template <class F>
INLINE Words encode_stochastic(Floats x, Words random) {
    Words bits = bits_of(x);
    Words magnitude = smaller(bits & MAGNITUDE, splat(F::LARGEST));
    Words code = encode_magnitude_stochastic<F::MANTISSA, F::BIAS>(magnitude, random);
    return code | ((bits & SIGN) >> 24);
}

}  // namespace
