// Casts with one scale for the whole tensor, and the amax of a tensor.
//
//     quantize     quantized = sat(x * scale), and the amax of x in the same pass
//     dequantize   out = quantized * scale_inv (one, or one per block of 128), rounded to out's dtype
//
// Reference: ds_fp8/numerics/cast.py.
#pragma once

#include "blocks.h"

namespace {

INLINE void raise_amax(uint32_t* amax, uint32_t bits) {
    bits = bits > INFINITE ? INFINITE : bits;  // NaN is reported as infinity
    uint32_t seen = __atomic_load_n(amax, __ATOMIC_RELAXED);
    while (bits > seen && !__atomic_compare_exchange_n(amax, &seen, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

template <class D, class F>
void quantize_range(const QuantizeJob& job, int64_t first, int64_t last) {
    const typename D::Type* x = static_cast<const typename D::Type*>(job.x);
    Words top = {};
    float scale = job.scale ? *job.scale : 1.0f;
    for (int64_t b = first; b < last; b++) {
        int count = elements_in_block(b, job.numel);
        Block block;
        read_block<D>(block, x + b * BLOCK, count);
        each_vector([&](int i) { top = larger(top, bits_of(block.v[i]) & MAGNITUDE); });
        if (!job.quantized) continue;
        scale_block(block, scale);
        encode_block(job.quantized + b * BLOCK, block, count, [](Floats v, int) { return encode_nearest<F>(v); });
    }
    if (job.amax) raise_amax(job.amax, largest(top));
}

template <class D, class F>
void dequantize_range(const DequantizeJob& job, int64_t first, int64_t last) {
    typename D::Type* out = static_cast<typename D::Type*>(job.out);
    bool streaming = job.streaming && uintptr_t(out) % 64 == 0;
    float scale_inv = job.scale_inv ? job.scale_inv[0] : 1.0f;
    for (int64_t b = first; b < last; b++) {
        int count = elements_in_block(b, job.numel);
        if (job.per_block) scale_inv = job.scale_inv[b];
        Block block;
        decode_block<F>(block, job.quantized + b * BLOCK, scale_inv, count);
        if (streaming && count == BLOCK)
            each_vector([&](int i) { D::write_stream(out + b * BLOCK + i * LANES, block.v[i]); });
        else
            write_block<D>(out + b * BLOCK, block, count);
    }
    if (streaming) finish_streams();
}

}  // namespace
