// int8 in scaled blocks of 128: evenly spaced values for the ratio m / sqrt(v), which is of one size within a block.
// Two instructions to decode, two to encode; e4m3 takes five and nine. Reference: ds_fp8/numerics/blocks8.py.
#pragma once

#include "flat.h"

namespace {

constexpr float BLOCKS8_TOP = 127.0f;

INLINE Floats decode_int8(const int8_t* quantized) {
    return __builtin_convertvector((Ints)sign_extend(load<Chars>(quantized)), Floats);
}

// The nearest code of x, |x| < 127.5, in the lowest byte of each lane: 1.5 * 2^23 leaves no bits for a fraction.
INLINE Words encode_int8(Floats x) { return bits_of(x + splat(12582912.0f)); }

// The lower neighbour in magnitude of min(|x|, 127) plus a random fraction, with the sign of x.
INLINE Words encode_int8_stochastic(Floats x, Words random) {
#if defined(__AVX512F__)
    __m512 fraction = _mm512_cvtepi32_ps((__m512i)(random >> 15));
    __m512 bounded = _mm512_range_ps((__m512)x, (__m512)splat(BLOCKS8_TOP), 0x2);  // the smaller magnitude, the sign of x
    fraction = (__m512)((Words)fraction | (bits_of(x) & SIGN));
    return (Words)_mm512_cvttps_epi32(_mm512_fmadd_ps(fraction, (__m512)splat(0x1p-17f), bounded));  // an exact product
#endif
    Words bits = bits_of(x);
    Floats magnitude = floats_of(smaller(bits & MAGNITUDE, splat(0x42fe0000u)));
    Words whole = (Words)__builtin_convertvector(magnitude + random_fraction<17>(random), Ints);  // towards zero
    Words negative = (Words)((Ints)bits >> 31);
    return (whole ^ negative) - negative;
}

INLINE void decode_int8_block(Block& x, const int8_t* quantized, float scale_inv, int count) {
    int8_t staged[BLOCK];
    if (__builtin_expect(count != BLOCK, 0)) {
        stage(staged, quantized, count);
        quantized = staged;
    } else {
        prefetch(quantized + AHEAD);
        prefetch(quantized + AHEAD + 64);
    }
    each_vector([&](int i) { x.v[i] = decode_int8(quantized + i * LANES) * splat(scale_inv); });
}

// Quantized values of one block; returns its scale_inv.
INLINE float encode_int8_block(uint8_t* quantized, const Block& block, int count, bool stochastic, uint32_t first_index,
                               Source source) {
    uint32_t amax = block_amax(block);
    float scale_inv = block_scale_inv(amax, BLOCKS8_TOP);
    if (__builtin_expect(amax >= INFINITE, 0)) {
        for (int i = 0; i < count; i++) quantized[i] = NAN_CODE;
        return scale_inv;
    }
    Floats scale = splat(1.0f / scale_inv);
    if (stochastic)
        encode_block(quantized, block, count, [&](Floats v, int i) {
            return encode_int8_stochastic(v * scale, random_bits(first_index + i * LANES, source));
        });
    else
        encode_block(quantized, block, count, [&](Floats v, int) { return encode_int8(v * scale); });
    return scale_inv;
}

}  // namespace
