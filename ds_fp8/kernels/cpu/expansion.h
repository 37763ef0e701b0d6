// e4m3 values that stretch to the range of their block: magnitudes are raised to a power k >= 1 before the cast.
// Every product and sum is spelled as in the counterpart, ds_fp8/numerics/expansion.py, which also explains them. The
// table of decoded values comes from there.
#pragma once

#include "flat.h"

namespace {

constexpr float SMALLEST_RATIO = SMALLEST_NORMAL;
constexpr float SIXTEEN_SPANS = float(16 * 17.807355880737305);  // 16 * log2(448 / 2^-9)
constexpr float LOG2_COEFFICIENTS[7] = {
    1.4426965713500977f, -0.7213602066040039f, 0.480613112449646f,   -0.3595244586467743f,
    0.2961195707321167f, -0.26796385645866394f, 0.16818659007549286f,
};
constexpr float EXP2_COEFFICIENTS[5] = {
    0.6931471824645996f, 0.2402234971523285f, 0.055503811687231064f, 0.00966636836528778f, 0.0013381302123889327f,
};

template <int count>
INLINE Floats horner(const float (&coefficients)[count], Floats x) {
    Floats total = splat(coefficients[count - 1]);
#pragma GCC unroll 8
    for (int i = count - 2; i >= 0; i--) total = total * x + splat(coefficients[i]);
    return total;
}

INLINE Floats log2_of(Floats u) {  // positive normal numbers
    Words bits = bits_of(u);
    Ints exponent = (Ints)(bits >> 23) - 127;
    Floats mantissa = floats_of((bits & 0x007fffffu) | 0x3f800000u);
    Ints high = mantissa > splat(1.4142135381698608f);
    mantissa = high ? mantissa * splat(0.5f) : mantissa;
    Floats fraction = mantissa - splat(1.0f);
    return __builtin_convertvector(exponent - high, Floats) + fraction * horner(LOG2_COEFFICIENTS, fraction);
}

INLINE Floats exp2_of(Floats y) {  // y <= 0
    y = y < splat(-126.0f) ? splat(-126.0f) : y;
    Ints whole = floor_of(y + splat(0.5f));
    Floats fraction = y - __builtin_convertvector(whole, Floats);
    return floats_of((Words)(whole + 127) << 23) * (fraction * horner(EXP2_COEFFICIENTS, fraction) + splat(1.0f));
}

#if defined(__AVX512F__)
// A row of the table in registers: a look-up among 32 numbers is one instruction, where a gather takes dozens of cycles.
struct Row {
    __m512 part[8];

    explicit INLINE Row(const float* row) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) part[i] = _mm512_loadu_ps(row + i * 16);
    }

    INLINE Floats operator[](Words code) const {  // the low 7 bits
        __m512i index = (__m512i)code;
        __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
        __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
        __m512 low = _mm512_permutex2var_ps(part[0], index, part[1]);
        low = _mm512_mask_mov_ps(low, bit5, _mm512_permutex2var_ps(part[2], index, part[3]));
        __m512 high = _mm512_permutex2var_ps(part[4], index, part[5]);
        high = _mm512_mask_mov_ps(high, bit5, _mm512_permutex2var_ps(part[6], index, part[7]));
        return (Floats)_mm512_mask_mov_ps(low, bit6, high);
    }
};
#else
struct Row {
    const float* row;

    explicit INLINE Row(const float* from) : row(from) {}

    INLINE Floats operator[](Words code) const {
        Words index = code & 0x7fu;
#if defined(__AVX2__)
        return (Floats)_mm256_i32gather_ps(row, (__m256i)index, 4);
#else
        Floats magnitude;
        for (int lane = 0; lane < LANES; lane++) magnitude[lane] = row[index[lane]];
        return magnitude;
#endif
    }
};
#endif

INLINE void decode_expanded_block(Block& x, const uint8_t* quantized, float scale_inv, const float* table_row, int count) {
    Row row(table_row);
    uint8_t staged[BLOCK];
    if (count != BLOCK) {
        stage(staged, quantized, count);
        quantized = staged;
    }
    each_vector([&](int i) {
        Words code = widen(load<Bytes>(quantized + i * LANES));
        Words value = bits_of(row[code] * splat(scale_inv));
        x.v[i] = floats_of(value ^ ((code & 0x80u) << 24));
    });
}

struct ExpandedScale {
    float scale_inv;
    uint8_t expansion;
};

INLINE ExpandedScale encode_expanded_block(uint8_t* quantized, const Block& x, int count, bool stochastic,
                                           uint32_t first_index, Source source, bool keep_positive) {
    uint32_t amax = block_amax(x);
    float scale_inv = block_scale_inv(amax, E4m3::MAX);
    if (__builtin_expect(amax >= INFINITE, 0)) {
        for (int i = 0; i < count; i++) quantized[i] = NAN_CODE;
        return {scale_inv, 16};
    }
    Floats scale = splat(1.0f / scale_inv), top = splat(E4m3::MAX);
    Block logs;       // log2(u), 1 where u counts as zero
    Floats lowest = {};
    each_vector([&](int i) {
        Floats ratio = floats_of(bits_of(x.v[i]) & MAGNITUDE) * scale;
        ratio = (ratio < top ? ratio : top) / top;
        Ints is_zero = ratio < splat(SMALLEST_RATIO);
        Floats log = log2_of(is_zero ? splat(SMALLEST_RATIO) : ratio);
        Floats counted = is_zero ? splat(0.0f) : log;
        lowest = counted < lowest ? counted : lowest;
        logs.v[i] = is_zero ? splat(1.0f) : log;
    });
    float span = 0.0f;
    for (int lane = 0; lane < LANES; lane++) span = -lowest[lane] > span ? -lowest[lane] : span;
    float wanted = span > 0.0f ? SIXTEEN_SPANS / span : 255.0f;
    wanted = wanted < 16.0f ? 16.0f : wanted > 255.0f ? 255.0f : wanted;
    uint8_t expansion = uint8_t(wanted);
    Floats power = splat(float(expansion) / 16.0f);
    encode_block(quantized, x, count, [&](Floats v, int i) {
        Floats expanded = top * exp2_of(logs.v[i] * power);
        expanded = logs.v[i] > splat(0.0f) ? splat(0.0f) : expanded;
        expanded = floats_of(bits_of(expanded) | (bits_of(v) & SIGN));
        Words code = stochastic ? encode_stochastic<E4m3>(expanded, random_bits(first_index + i * LANES, source))
                                : encode_nearest_within<E4m3>(expanded);
        if (keep_positive) code = larger(code & 0xffu, (Words)((Ints)bits_of(v) > 0) & 1u);
        return code;
    });
    return {scale_inv, expansion};
}

}  // namespace
