// Flat partitions: one fp32 scale_inv for each 128 consecutive elements.
//
//     scale_inv = max(amax / format.max, 2^-126), scale = 1 / scale_inv     exact, never a power of two on purpose
//
// A block that holds infinity or NaN gets a NaN scale_inv, so that all of it decodes to NaN: an overflow on one rank is
// seen by every rank that reads the block. Twin: ds_fp8/numerics/flat.py.
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

// Codes of one block; returns its scale_inv. `keep_positive`: a zero code of a positive number becomes the smallest
// code (sqrt(v), which must not divide by eps alone).
template <class F>
INLINE float encode_flat_block(uint8_t* codes, const Block& block, int count, bool stochastic, uint32_t first_index,
                               Source source, bool keep_positive = false) {
    uint32_t amax = block_amax(block);
    float scale_inv = block_scale_inv(amax, F::MAX);
    if (__builtin_expect(amax >= INFINITE, 0)) {
        for (int i = 0; i < count; i++) codes[i] = NAN_CODE;
        return scale_inv;
    }
    Floats scale = splat(1.0f / scale_inv);
    auto positive = [&](Words code, Floats v) {
        return keep_positive ? larger(code & 0xffu, (Words)((Ints)bits_of(v) > 0) & 1u) : code;
    };
    if (stochastic)
        encode_block(codes, block, count, [&](Floats v, int i) {
            return positive(encode_stochastic<F>(v * scale, random_bits(first_index + i * LANES, source)), v);
        });
    else
        encode_block(codes, block, count,
                     [&](Floats v, int) { return positive(encode_nearest_within<F>(v * scale), v); });
    return scale_inv;
}

template <class D, class F>
void flat_encode_range(const FlatEncodeJob& job, int64_t first, int64_t last) {
    const typename D::Type* x = static_cast<const typename D::Type*>(job.x);
    for (int64_t b = first; b < last; b++) {
        int count = elements_in_block(b, job.numel);
        Block block;
        read_block<D>(block, x + b * BLOCK, count);
        job.scale_inv[b] = encode_flat_block<F>(job.codes + b * BLOCK, block, count, job.stochastic,
                                                job.first + uint32_t(b * BLOCK), {job.key, 0});
    }
}

// D: type of `out`, F: format of the contributions, G: format of the sum encoded again.
template <class D, class F>
void flat_sum_range(const FlatSumJob& job, int64_t first, int64_t last) {
    typename D::Type* out = static_cast<typename D::Type*>(job.out);
    for (int64_t b = first; b < last; b++) {
        int count = elements_in_block(b, job.numel);
        Block sum;
        decode_block<F>(sum, job.codes + b * BLOCK, job.scale_inv[b], count);
        for (int64_t w = 1; w < job.contributions; w++) {
            Block one;
            decode_block<F>(one, job.codes + w * job.codes_stride + b * BLOCK, job.scale_inv[w * job.scale_stride + b],
                            count);
            each_vector([&](int i) { sum.v[i] = sum.v[i] + one.v[i]; });
        }
        scale_block(sum, job.factor);
        if (out) write_block<D>(out + b * BLOCK, sum, count);
        if (!job.out_codes) continue;
        uint8_t* codes = job.out_codes + b * BLOCK;
        job.out_scale_inv[b] = job.out_fmt == E4M3 ? encode_flat_block<E4m3>(codes, sum, count, false, 0, {})
                                                   : encode_flat_block<E5m2>(codes, sum, count, false, 0, {});
    }
}

}  // namespace
