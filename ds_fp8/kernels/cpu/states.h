// exp_avg and exp_avg_sq of one block, in any of the six formats. Reference: ds_fp8/numerics/states.py.
//
// The format is looked at once per block, in a branch that always goes the same way: 6 x 5 x 5 x 4 combinations of
// formats need no 500 copies of the code. All but fp32 are calls, which keeps the build short.
#pragma once

#include "blocks16.h"
#include "blocks8.h"
#include "expansion.h"

namespace {

__attribute__((noinline)) void read_quantized(Block& x, const State& state, const float* table, int64_t b, int count) {
    switch (state.format) {
        case STATE_BF16: return read_block<Bf16>(x, static_cast<const uint16_t*>(state.data) + b * BLOCK, count);
        case STATE_FP16:
            return decode_half_block(x, static_cast<const uint16_t*>(state.data) + b * BLOCK, state.scale_inv[b], count);
        case STATE_E4M3:
            return decode_block<E4m3>(x, static_cast<const uint8_t*>(state.data) + b * BLOCK, state.scale_inv[b], count);
        case STATE_INT8:
            return decode_int8_block(x, static_cast<const int8_t*>(state.data) + b * BLOCK, state.scale_inv[b], count);
        case STATE_EXPANDED:
            return decode_expanded_block(x, static_cast<const uint8_t*>(state.data) + b * BLOCK, state.scale_inv[b],
                                         table + state.expansion[b] * BLOCK, count);
    }
}

INLINE void read_state(Block& x, const State& state, const float* table, int64_t b, int count) {
    if (state.format == STATE_FP32) return read_block<Fp32>(x, static_cast<const float*>(state.data) + b * BLOCK, count);
    read_quantized(x, state, table, b, count);
}

// What exp_avg is divided by where it is a ratio: r = sqrt(v), 1 where that is zero.
INLINE Floats divisor(Floats r) {
#if defined(__AVX512F__)
    // A table of what becomes of each kind of number: all stay what they are, zero becomes one.
    return (Floats)_mm512_fixupimm_ps((__m512)r, (__m512)r, _mm512_set1_epi32(0x11111a11), 0);
#else
    return r == splat(0.0f) ? splat(1.0f) : r;
#endif
}

INLINE Floats round_bf16_stochastic(Floats x, Words random) {
    Words bits = bits_of(x);
    Words rounded = (bits + (random >> 16)) & 0xffff0000u;
    return floats_of((Ints)(bits & MAGNITUDE) < (Ints)splat(INFINITE) ? rounded : bits);
}

// `keep_positive` for sqrt(v). May change x.
__attribute__((noinline)) void write_quantized(const State& state, Block& x, int64_t b, int count, bool stochastic, bool keep_positive, int shift) {
    uint32_t first = uint32_t(b * BLOCK);
    Source source = {state.key, shift};
    switch (state.format) {
        case STATE_BF16:
            if (stochastic)
                each_vector([&](int i) {
                    x.v[i] = round_bf16_stochastic(x.v[i], random_bits(first + i * LANES, source));
                });
            return write_block<Bf16>(static_cast<uint16_t*>(state.data) + b * BLOCK, x, count);
        case STATE_FP16:
            state.scale_inv[b] = encode_half_block<false>(static_cast<uint16_t*>(state.data) + b * BLOCK, x, count, stochastic,
                                                   first, source, keep_positive);
            return;
        case STATE_E4M3:
            state.scale_inv[b] = encode_flat_block<E4m3>(static_cast<uint8_t*>(state.data) + b * BLOCK, x, count,
                                                         stochastic, first, source, keep_positive);
            return;
        case STATE_INT8:  // exp_avg only, which may be zero
            state.scale_inv[b] = encode_int8_block(static_cast<uint8_t*>(state.data) + b * BLOCK, x, count, stochastic, first,
                                                   source);
            return;
        case STATE_EXPANDED: {
            ExpandedScale scale = encode_expanded_block(static_cast<uint8_t*>(state.data) + b * BLOCK, x, count,
                                                        stochastic, first, source, keep_positive);
            state.scale_inv[b] = scale.scale_inv;
            state.expansion[b] = scale.expansion;
        }
    }
}

INLINE void write_state(const State& state, Block& x, int64_t b, int count, bool stochastic, bool keep_positive, int shift) {
    if (state.format == STATE_FP32) return write_block<Fp32>(static_cast<float*>(state.data) + b * BLOCK, x, count);
    write_quantized(state, x, b, count, stochastic, keep_positive, shift);
}

}  // namespace
