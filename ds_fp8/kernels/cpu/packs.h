// bf16 weights and gradients, and the master of 24 bits, several vectors at a time.
//
// To widen and to shift every vector by itself costs a processor with AVX-512 a cycle per instruction, as much as a product.
// One permutation of 16-bit lanes does both, and takes its lanes from two registers: the weight and its remainder are
// interleaved on the way in, and parted on the way out. Other paths go vector by vector.
#pragma once

#include "masters.h"

namespace {

constexpr int PACK = 4;  // vectors

#if defined(__AVX512F__)

typedef uint16_t Places __attribute__((vector_size(64)));

template <class F>
INLINE __m512i places(F place) {
    Places v = {};
#pragma GCC unroll 32
    for (int i = 0; i < 32; i++) v[i] = uint16_t(place(i));
    return (__m512i)v;
}

// Lane i of each: from the first register (0 to 31) or from the second (32 to 63).
INLINE __m512i interleave(__m512i low, __m512i high, int first) {
    __m512i at_0 = places([](int i) { return i / 2 + (i % 2) * 32; });
    __m512i at_16 = places([](int i) { return 16 + i / 2 + (i % 2) * 32; });
    return _mm512_permutex2var_epi16(low, first ? at_16 : at_0, high);
}
INLINE __m512i lower_halves(Words a, Words b) {
    return _mm512_permutex2var_epi16((__m512i)a, places([](int i) { return 2 * i; }), (__m512i)b);
}
INLINE __m512i upper_halves(Words a, Words b) {
    return _mm512_permutex2var_epi16((__m512i)a, places([](int i) { return 2 * i + 1; }), (__m512i)b);
}

INLINE void read_pack(Floats* x, const uint16_t* from) {
#pragma GCC unroll 2
    for (int p = 0; p < PACK; p += 2) {
        __m512i halves = _mm512_loadu_si512(from + p * LANES);
        x[p] = (Floats)interleave(_mm512_setzero_si512(), halves, 0);
        x[p + 1] = (Floats)interleave(_mm512_setzero_si512(), halves, 16);
    }
}

INLINE void read_split24_pack(Floats* w, const uint16_t* weights, const int8_t* remainders) {
    // A remainder b counts 2^8 b; as the byte b + 128 it has no sign, and 2^15 too much.
    __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(remainders), _mm512_set1_epi8(-128));
    bytes = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), bytes);
    __m512i zero = _mm512_setzero_si512();
    __m512i low[2] = {_mm512_unpacklo_epi8(zero, bytes), _mm512_unpackhi_epi8(zero, bytes)};
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
        __m512i high = _mm512_loadu_si512(weights + 2 * p * LANES);
        for (int i = 0; i < 2; i++) {
            __m512 joined = (__m512)((Words)interleave(low[p], high, 16 * i) - 0x8000u);
            // As in `join`: seen only where a weight was written in place.
            __mmask16 none = _mm512_cmp_ps_mask(joined, joined, _CMP_UNORD_Q);
            if (__builtin_expect(none, 0)) joined = _mm512_mask_mov_ps(joined, none, (__m512)interleave(zero, high, 16 * i));
            w[2 * p + i] = (Floats)joined;
        }
    }
}

// NaN becomes the canonical one, as in split_bf16_8.
INLINE Words canonical(Floats x) {
    // A table of what becomes of each kind of number: NaN of both kinds the first argument, all others the second.
    return (Words)_mm512_fixupimm_ps((__m512)splat(float_of(0x7fc00000u)), (__m512)x, _mm512_set1_epi32(0x11111100), 0);
}

template <bool stochastic>
INLINE void write_split24_pack(const Floats* w, uint16_t* weights, int8_t* remainders, const uint32_t* words) {
#pragma GCC unroll 2
    for (int p = 0; p < PACK; p += 2) {
        Words bits[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
            bits[i] = canonical(w[p + i]) +
                      (stochastic ? load<Words>(words + (p + i) * LANES) << MASTER_SHIFT >> 24 : splat(0x80u));
        _mm512_storeu_si512(weights + p * LANES, upper_halves(bits[0] + 0x8000u, bits[1] + 0x8000u));
        __m512i low = _mm512_srli_epi16(lower_halves(bits[0], bits[1]), 8);
        _mm256_storeu_si256((__m256i*)(remainders + p * LANES), _mm512_cvtepi16_epi8(low));
    }
}

#else

INLINE void read_pack(Floats* x, const uint16_t* from) {
    for (int p = 0; p < PACK; p++) x[p] = Bf16::read(from + p * LANES);
}

INLINE void read_split24_pack(Floats* w, const uint16_t* weights, const int8_t* remainders) {
    for (int p = 0; p < PACK; p++)
        w[p] = join<int8_t>(true, widen(load<Halves>(weights + p * LANES)),
                            sign_extend(load<Chars>(remainders + p * LANES)));
}

template <bool stochastic>
INLINE void write_split24_pack(const Floats* w, uint16_t* weights, int8_t* remainders, const uint32_t* words) {
    for (int p = 0; p < PACK; p++) {
        Words random = stochastic ? load<Words>(words + p * LANES) << MASTER_SHIFT : Words{};
        Split split = split_bf16_8(w[p], stochastic, random);
        store(weights + p * LANES, low_halves(split.weight));
        store_remainder(remainders + p * LANES, split.remainder);
    }
}

#endif

INLINE void read_pack(Floats* x, const float* from) {
    for (int p = 0; p < PACK; p++) x[p] = Fp32::read(from + p * LANES);
}

}  // namespace
