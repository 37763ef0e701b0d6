// GEMM operands of the block recipe: tiles of tile_rows x 128 elements share a scale (1x128 for activations and
// gradients, 128x128 for weights). A row whose length is not a multiple of 128 ends in a narrower tile.
//
//     scale = format.max / amax, or 1 where amax is zero or not finite; optionally its mantissa is cleared
//
// Unit of work: a row of tiles. Reference: ds_fp8/numerics/gemm_blocks.py.
#pragma once

#include "flat.h"

namespace {

INLINE float tile_scale(uint32_t amax_bits, float format_max, bool power_of_two) {
    if (amax_bits == 0 || amax_bits >= INFINITE) return 1.0f;
    float scale = format_max / float_of(amax_bits);
    if (bits_of(scale) >= INFINITE) scale = float_of(INFINITE - 1);  // the largest finite number
    return power_of_two ? float_of(bits_of(scale) & (SIGN | INFINITE)) : scale;
}

template <class D, class F>
void tile_quantize_range(const TileJob& job, int64_t first, int64_t last) {
    const typename D::Type* x = static_cast<const typename D::Type*>(job.x);
    int64_t tiles = (job.columns + BLOCK - 1) / BLOCK;
    for (int64_t tile_row = first; tile_row < last; tile_row++) {
        int64_t top = tile_row * job.tile_rows;
        int64_t bottom = top + job.tile_rows < job.rows ? top + job.tile_rows : job.rows;
        for (int64_t tile = 0; tile < tiles; tile++) {
            int count = elements_in_block(tile, job.columns);
            Block block;
            uint32_t amax = 0;
            for (int64_t row = top; row < bottom; row++) {
                read_block<D>(block, x + row * job.columns + tile * BLOCK, count);
                uint32_t bits = block_amax(block);
                amax = bits > amax ? bits : amax;
            }
            float scale = tile_scale(amax, F::MAX, job.power_of_two);
            job.scale_inv[tile_row * tiles + tile] = 1.0f / scale;
            for (int64_t row = top; row < bottom; row++) {
                int64_t at = row * job.columns + tile * BLOCK;
                if (bottom - top > 1) read_block<D>(block, x + at, count);
                scale_block(block, scale);
                encode_block(job.quantized + at, block, count, [](Floats v, int) { return encode_nearest<F>(v); });
            }
        }
    }
}

template <class D, class F>
void tile_dequantize_range(const TileJob& job, int64_t first, int64_t last) {
    typename D::Type* x = static_cast<typename D::Type*>(job.x);
    int64_t tiles = (job.columns + BLOCK - 1) / BLOCK;
    for (int64_t tile_row = first; tile_row < last; tile_row++) {
        int64_t top = tile_row * job.tile_rows;
        int64_t bottom = top + job.tile_rows < job.rows ? top + job.tile_rows : job.rows;
        for (int64_t row = top; row < bottom; row++)
            for (int64_t tile = 0; tile < tiles; tile++) {
                int count = elements_in_block(tile, job.columns);
                int64_t at = row * job.columns + tile * BLOCK;
                Block block;
                decode_block<F>(block, job.quantized + at, job.scale_inv[tile_row * tiles + tile], count);
                write_block<D>(x + at, block, count);
            }
    }
}

}  // namespace
