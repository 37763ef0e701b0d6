// A block: 128 elements in registers (or in the first cache level), between two trips to memory.
//
// Every kernel reads blocks, works on them, writes blocks. The last block of a buffer may be short: it is staged
// through a small array that repeats its last element, so that the arithmetic sees only values that are really there
// (a padding of zeros could turn into 0 / 0 and spoil the block's amax).
#pragma once

#include "formats.h"
#include "jobs.h"

namespace {

constexpr int VECTORS = BLOCK / LANES;
constexpr int64_t AHEAD = 1024;  // bytes prefetched ahead of the one being read: some hundred nanoseconds of work

struct Block {
    Floats v[VECTORS];
};

template <class F>
INLINE void each_vector(F f) {
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; i++) f(i);
}

INLINE int elements_in_block(int64_t block, int64_t numel) {
    int64_t left = numel - block * BLOCK;
    return left < BLOCK ? int(left) : BLOCK;
}

template <class T>
INLINE void stage(T* staged, const T* from, int count) {
    for (int i = 0; i < BLOCK; i++) staged[i] = from[i < count ? i : count - 1];
}

template <class D>
INLINE void read_block(Block& x, const typename D::Type* from, int count) {
    if (__builtin_expect(count == BLOCK, 1)) {
        // A line holds 64 bytes, so a block of this type spans BLOCK * sizeof / 64 lines.
        for (int line = 0; line < int(BLOCK * sizeof(typename D::Type) / 64); line++)
            prefetch((const char*)from + AHEAD + line * 64);
        each_vector([&](int i) { x.v[i] = D::read(from + i * LANES); });
    } else {
        typename D::Type staged[BLOCK];
        stage(staged, from, count);
        each_vector([&](int i) { x.v[i] = D::read(staged + i * LANES); });
    }
}

template <class D>
INLINE void write_block(typename D::Type* to, const Block& x, int count) {
    if (__builtin_expect(count == BLOCK, 1)) {
        each_vector([&](int i) { D::write(to + i * LANES, x.v[i]); });
    } else {
        typename D::Type staged[BLOCK];
        each_vector([&](int i) { D::write(staged + i * LANES, x.v[i]); });
        for (int i = 0; i < count; i++) to[i] = staged[i];
    }
}

// x = quantized * scale_inv. `finite` as in formats.h.
template <class F, bool finite = false>
INLINE void decode_block(Block& x, const uint8_t* quantized, float scale_inv, int count) {
    uint8_t staged[BLOCK];
    if (__builtin_expect(count != BLOCK, 0)) {
        stage(staged, quantized, count);
        quantized = staged;
    } else {
        prefetch(quantized + AHEAD);
        prefetch(quantized + AHEAD + 64);
    }
    float factor = scale_inv * F::UNIT;
    each_vector([&](int i) { x.v[i] = F::template decode<finite>(load<Bytes>(quantized + i * LANES)) * splat(factor); });
    // A scale_inv so large that the factor overflows: first the unit, then the scale.
    if (__builtin_expect((bits_of(factor) & MAGNITUDE) == INFINITE, 0))
        each_vector([&](int i) {
            x.v[i] = F::template decode<finite>(load<Bytes>(quantized + i * LANES)) * splat(F::UNIT) * splat(scale_inv);
        });
}

// `encode(vector, index)` gives the quantized values of one vector, in the lowest byte of each lane.
template <class E>
INLINE void encode_block(uint8_t* quantized, const Block& x, int count, E encode) {
    if (__builtin_expect(count == BLOCK, 1)) {
        each_vector([&](int i) { store(quantized + i * LANES, low_bytes(encode(x.v[i], i))); });
    } else {
        uint8_t staged[BLOCK];
        each_vector([&](int i) { store(staged + i * LANES, low_bytes(encode(x.v[i], i))); });
        for (int i = 0; i < count; i++) quantized[i] = staged[i];
    }
}

// Bits of the largest magnitude; NaN comes out above infinity.
INLINE uint32_t block_amax(const Block& x) {
    Words top = {};
    each_vector([&](int i) { top = larger(top, bits_of(x.v[i]) & MAGNITUDE); });
    return largest(top);
}

INLINE void scale_block(Block& x, float factor) {
    each_vector([&](int i) { x.v[i] *= splat(factor); });
}

}  // namespace
