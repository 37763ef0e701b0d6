// Flat partitions: one fp32 scale_inv for each 128 consecutive elements.
//
//     scale_inv = max(amax / format.max, 2^-126), scale = 1 / scale_inv     exact, never a power of two on purpose
//
// A block that holds infinity or NaN gets a NaN scale_inv, so that all of it decodes to NaN: an overflow on one rank is
// seen by every rank that reads the block. Reference: ds_fp8/numerics/flat.py.
#pragma once

#include "codec.h"
#include "rounding.h"

namespace {

constexpr float SMALLEST_NORMAL = 1.17549435e-38f;  // 2^-126: its inverse is finite
constexpr uint8_t NAN_CODE = 0x7f;

// NaN for a block that is not finite.
INLINE float block_scale_inv(uint32_t amax_bits, float format_max) {
    if (amax_bits >= INFINITE) return float_of(0x7fc00000u);
    float scale_inv = float_of(amax_bits) / format_max;
    return scale_inv > SMALLEST_NORMAL ? scale_inv : SMALLEST_NORMAL;
}

// Quantized values of one block; returns its scale_inv. `keep_positive`: a zero code of a positive number becomes the
// smallest code (sqrt(v), which must not divide by eps alone).
template <class F>
INLINE float encode_flat_block(uint8_t* quantized, const Block& block, int count, bool stochastic, uint32_t first_index,
                               Source source, bool keep_positive = false) {
    uint32_t amax = block_amax(block);
    float scale_inv = block_scale_inv(amax, F::MAX);
    if (__builtin_expect(amax >= INFINITE, 0)) {
        for (int i = 0; i < count; i++) quantized[i] = NAN_CODE;
        return scale_inv;
    }
    Floats scale = splat(1.0f / scale_inv);
    auto positive = [&](Words code, Floats v) {
        return keep_positive ? larger(code & 0xffu, (Words)((Ints)bits_of(v) > 0) & 1u) : code;
    };
    if (stochastic)
        encode_block(quantized, block, count, [&](Floats v, int i) {
            return positive(encode_stochastic<F>(v * scale, random_bits(first_index + i * LANES, source)), v);
        });
    else
        encode_block(quantized, block, count,
                     [&](Floats v, int) { return positive(encode_nearest_within<F>(v * scale), v); });
    return scale_inv;
}

// Sum of 128 floats by halves: element i + 64 onto i, then i + 32, and so on, whatever the width of a vector.
INLINE float sum_by_halves(Block& x) {
#pragma GCC unroll 8
    for (int half = VECTORS / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x.v[i] += x.v[i + half];
#if defined(__AVX512F__)
    __m512 all = (__m512)x.v[0];
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_shuffle_ps(two, two, 1));
#else
    Floats v = x.v[0];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

// Nearest FP8 values of x * scale, which lies within the format; returns the squared error, in units of the quantized
// values.
template <class F>
INLINE float encode_and_judge(uint8_t* quantized, const Block& x, Floats scale) {
    Block error;
    each_vector([&](int i) {
        Floats v = x.v[i] * scale, rounded;
        Words bits = bits_of(v);
        Words code = encode_magnitude<F::MANTISSA, F::BIAS>(bits & MAGNITUDE, rounded);
        store(quantized + i * LANES, low_bytes(code | ((bits >> 24) & 0x80u)));
        Floats missed = rounded - floats_of(bits & MAGNITUDE);
        error.v[i] = missed * missed;
    });
    return sum_by_halves(error);
}

// Quantized values of one block under the better of two scales: amax at the format's maximum, 1.75 * 2^n, or at 2^n. No
// scale suits all blocks, for the spacing of FP8 values doubles at each power of two; both bring amax to a code that is
// exact.
template <class F>
INLINE float encode_best_of_two_block(uint8_t* quantized, Block& block, int count) {
    constexpr float LOWER = F::MAX * 4 / 7, RATIO = 49.0f / 16.0f;  // RATIO: (MAX / LOWER)^2
    uint32_t amax = block_amax(block);
    float scale_inv = block_scale_inv(amax, F::MAX);
    if (__builtin_expect(amax >= INFINITE, 0)) {
        for (int i = 0; i < count; i++) quantized[i] = NAN_CODE;
        return scale_inv;
    }
    if (__builtin_expect(count != BLOCK, 0)) {  // what pads a short block must not be judged
        float staged[BLOCK];
        each_vector([&](int i) { store(staged + i * LANES, block.v[i]); });
        for (int i = count; i < BLOCK; i++) staged[i] = 0;
        each_vector([&](int i) { block.v[i] = load<Floats>(staged + i * LANES); });
    }
    uint8_t made[2][BLOCK];
    float other_inv = block_scale_inv(amax, LOWER);
    float upper = encode_and_judge<F>(made[0], block, splat(1.0f / scale_inv));
    float lower = encode_and_judge<F>(made[1], block, splat(1.0f / other_inv));
    bool take_lower = lower * RATIO < upper;
    if (__builtin_expect(count == BLOCK, 1))
        __builtin_memcpy(quantized, made[take_lower], BLOCK);
    else
        for (int i = 0; i < count; i++) quantized[i] = made[take_lower][i];
    return take_lower ? other_inv : scale_inv;
}

template <class D, class F>
void flat_encode_range(const FlatEncodeJob& job, int64_t first, int64_t last) {
    const typename D::Type* x = static_cast<const typename D::Type*>(job.x);
    for (int64_t b = first; b < last; b++) {
        int count = elements_in_block(b, job.numel);
        Block block;
        read_block<D>(block, x + b * BLOCK, count);
        if (job.best_of_two) {
            job.scale_inv[b] = encode_best_of_two_block<F>(job.quantized + b * BLOCK, block, count);
            continue;
        }
        job.scale_inv[b] = encode_flat_block<F>(job.quantized + b * BLOCK, block, count, job.stochastic,
                                                job.first + uint32_t(b * BLOCK), {job.key, 0});
    }
}

INLINE void read_own(Block& own, const FlatSumJob& job, int64_t b, int count) {
    const uint16_t* halves = static_cast<const uint16_t*>(job.own) + b * BLOCK;
    if (job.own_dtype == FP32) read_block<Fp32>(own, static_cast<const float*>(job.own) + b * BLOCK, count);
    else if (job.own_dtype == BF16) read_block<Bf16>(own, halves, count);
    else read_block<Fp16>(own, halves, count);
}

template <class G>
INLINE float encode_sum(uint8_t* quantized, Block& sum, int count, bool best_of_two) {
    return best_of_two ? encode_best_of_two_block<G>(quantized, sum, count) : encode_flat_block<G>(quantized, sum, count, false, 0, {});
}

// D: type of `out`, F: format of the contributions.
template <class D, class F>
void flat_sum_range(const FlatSumJob& job, int64_t first, int64_t last) {
    typename D::Type* out = static_cast<typename D::Type*>(job.out);
    for (int64_t b = first; b < last; b++) {
        int count = elements_in_block(b, job.numel);
        Block sum;
        if (job.own) read_own(sum, job, b, count);
        else decode_block<F>(sum, job.quantized + b * BLOCK, job.scale_inv[b], count);
        for (int64_t w = job.own ? 0 : 1; w < job.contributions; w++) {
            Block one;
            decode_block<F>(one, job.quantized + w * job.quantized_stride + b * BLOCK, job.scale_inv[w * job.scale_stride + b],
                            count);
            each_vector([&](int i) { sum.v[i] = sum.v[i] + one.v[i]; });
        }
        scale_block(sum, job.factor);
        if (out) write_block<D>(out + b * BLOCK, sum, count);
        if (!job.quantized_out) continue;
        uint8_t* quantized = job.quantized_out + b * BLOCK;
        job.out_scale_inv[b] = job.out_fmt == E4M3 ? encode_sum<E4m3>(quantized, sum, count, job.best_of_two)
                                                   : encode_sum<E5m2>(quantized, sum, count, job.best_of_two);
    }
}

}  // namespace
