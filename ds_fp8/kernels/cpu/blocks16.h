// fp16 in scaled blocks of 128: each block's amax is brought to 2^15, so that nothing underflows that matters.
// Twin: ds_fp8/numerics/blocks16.py.
#pragma once

#include "flat.h"

namespace {

constexpr float BLOCKS16_TOP = 32768.0f;
constexpr uint16_t NAN_HALF = 0x7e00;

INLINE void decode_half_block(Block& x, const uint16_t* codes, float scale_inv, int count) {
    read_block<Fp16>(x, codes, count);
    scale_block(x, scale_inv);
}

// Codes of one block, which becomes what they decode to; returns its scale_inv. `keep_positive`: a zero code of a
// positive number becomes the smallest code (sqrt(v), which must not divide by eps alone).
INLINE float encode_half_block(uint16_t* codes, Block& x, int count, bool stochastic, uint32_t first_index, uint32_t key,
                               bool keep_positive) {
    uint32_t amax = block_amax(x);
    float scale_inv = block_scale_inv(amax, BLOCKS16_TOP);
    if (__builtin_expect(amax >= INFINITE, 0)) {
        for (int i = 0; i < count; i++) codes[i] = NAN_HALF;
        each_vector([&](int i) { x.v[i] = splat(scale_inv); });
        return scale_inv;
    }
    float scale = 1.0f / scale_inv;
    uint16_t staged[BLOCK];
    uint16_t* to = count == BLOCK ? codes : staged;
    each_vector([&](int i) {
        Words bits = bits_of(x.v[i] * splat(scale));
        Words code;
        if (stochastic)
            code = encode_magnitude_stochastic<10, 15>(bits & MAGNITUDE, random_bits(first_index + i * LANES, key)) |
                   ((bits & SIGN) >> 16);
        else
            code = widen(float_to_half(floats_of(bits)));
        if (keep_positive) code = larger(code, (Words)((Ints)bits_of(x.v[i]) > 0) & 1u);
        Halves half = narrow_to_halves(code);
        store(to + i * LANES, half);
        x.v[i] = half_to_float(half) * splat(scale_inv);
    });
    if (count != BLOCK)
        for (int i = 0; i < count; i++) codes[i] = staged[i];
    return scale_inv;
}

}  // namespace
