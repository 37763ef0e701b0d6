// fp16 in scaled blocks of 128: each block's amax is brought to 2^15, so that nothing underflows that matters.
// Reference: ds_fp8/numerics/blocks16.py.
#pragma once

#include "flat.h"

namespace {

constexpr float BLOCKS16_TOP = 32768.0f;
constexpr uint16_t NAN_HALF = 0x7e00;

INLINE void decode_half_block(Block& x, const uint16_t* quantized, float scale_inv, int count) {
    read_block<Fp16>(x, quantized, count);
    scale_block(x, scale_inv);
}

INLINE Halves smallest_if_positive(Halves code, Floats x) {
#if defined(__AVX512F__)
    __mmask16 positive = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return (Halves)_mm256_mask_max_epu16((__m256i)code, positive, (__m256i)code, _mm256_set1_epi16(1));
#else
    return narrow_to_halves(larger(widen(code), (Words)((Ints)bits_of(x) > 0) & 1u));
#endif
}

constexpr float SMALLEST_NORMAL_HALF = 0x1p-14f;

// Stochastic code of positive x that are normal in fp16 and below its end: bits added below the mantissa, and cut.
INLINE Halves normal_half_stochastic(Floats x, Words random) {
    Floats raised = floats_of(bits_of(x) + (random >> 19));
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)raised, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Halves)_mm256_cvtps_ph((__m256)raised, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
    return narrow_to_halves((bits_of(raised) >> 13) - (112u << 10));
#endif
}

// Quantized values of one block; returns its scale_inv. `decoded`: the block becomes what the quantized values say.
// `keep_positive`: a zero code of a positive number becomes the smallest code (sqrt(v), which must not divide by eps
// alone).
template <bool decoded>
INLINE float encode_half_block(uint16_t* quantized, Block& x, int count, bool stochastic, uint32_t first_index, Source source,
                               bool keep_positive) {
    uint32_t amax = block_amax(x);
    float scale_inv = block_scale_inv(amax, BLOCKS16_TOP);
    if (__builtin_expect(amax >= INFINITE, 0)) {
        for (int i = 0; i < count; i++) quantized[i] = NAN_HALF;
        if (decoded) each_vector([&](int i) { x.v[i] = splat(scale_inv); });
        return scale_inv;
    }
    float scale = 1.0f / scale_inv;
    uint16_t staged[BLOCK];
    uint16_t* to = count == BLOCK ? quantized : staged;
    auto put = [&](int i, Halves code) {
        if (keep_positive) code = smallest_if_positive(code, x.v[i]);
        store(to + i * LANES, code);
        if (decoded) x.v[i] = half_to_float(code) * splat(scale_inv);
    };
    if (stochastic)
        each_vector([&](int i) {
            Words bits = bits_of(x.v[i] * splat(scale));
            Words random = random_bits(first_index + i * LANES, source);
            Words code = encode_magnitude_stochastic<10, 15>(bits & MAGNITUDE, random);
            put(i, narrow_to_halves(code | ((bits & SIGN) >> 16)));
        });
    else
        each_vector([&](int i) { put(i, float_to_half(x.v[i] * splat(scale))); });
    if (count != BLOCK)
        for (int i = 0; i < count; i++) quantized[i] = staged[i];
    return scale_inv;
}

}  // namespace
