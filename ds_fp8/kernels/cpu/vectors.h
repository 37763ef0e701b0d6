// Vectors of LANES floats, the width of the path that this translation unit is compiled for.
//
// The kernels are written once, with the compiler's vector extensions, and compiled three times with other flags:
// AVX-512 (16 lanes), AVX2 + F16C (8) and portable (4: SSE2 or NEON). Every operation below is one IEEE operation per
// lane, so the three give the same bits. Nothing may be fused or reassociated: -ffp-contract=off, never -ffast-math.
//
// Everything lives in an anonymous namespace. If the three units shared an inline function the linker would keep one
// copy, perhaps the AVX-512 one, and the portable path would crash on an older CPU. For the same reason no header of
// the C++ library is included: their inline functions would be shared.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef int8_t Chars __attribute__((vector_size(LANES)));

template <class V, class T>
INLINE V load(const T* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof(V));
    return v;
}

template <class V, class T>
INLINE void store(T* to, V v) {
    __builtin_memcpy(to, &v, sizeof(V));
}

INLINE Floats splat(float x) { return Floats{} + x; }
INLINE Words splat(uint32_t x) { return Words{} + x; }
INLINE Words bits_of(Floats x) { return (Words)x; }
INLINE Floats floats_of(Words x) { return (Floats)x; }

INLINE uint32_t bits_of(float x) {
    uint32_t word;
    __builtin_memcpy(&word, &x, 4);
    return word;
}

INLINE float float_of(uint32_t word) {
    float x;
    __builtin_memcpy(&x, &word, 4);
    return x;
}

// Magnitudes are compared as integers: for non-negative floats the order is the same, and NaN comes out on top instead
// of vanishing, as it does in float comparisons.
INLINE Words larger(Words a, Words b) {
#if defined(__AVX512F__)
    return (Words)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Words)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}

INLINE Words smaller(Words a, Words b) {
#if defined(__AVX512F__)
    return (Words)_mm512_min_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Words)_mm256_min_epu32((__m256i)a, (__m256i)b);
#else
    return a < b ? a : b;
#endif
}

INLINE uint32_t largest(Words v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epu32((__m512i)v);
#else
    uint32_t top = 0;
    for (int i = 0; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

INLINE Floats root(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (Floats)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (Floats)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

#if defined(__x86_64__) && !defined(__FMA__)
// a * b + c rounded once, without the instruction: the product is exact in double; the sum is rounded to odd (the last
// bit tells whether anything was lost), so that rounding it again to float gives the right answer (Boldo, Melquiond).
INLINE float fused(float a, float b, float c) {
    double product = double(a) * double(b), addend = c, sum = product + addend;
    double part = sum - product;
    double lost = (product - (sum - part)) + (addend - part);
    int64_t pattern;
    __builtin_memcpy(&pattern, &sum, 8);
    if ((lost < 0 || lost > 0) && !(pattern & 1)) {
        pattern += (lost > 0) == (sum > 0) ? 1 : -1;
        __builtin_memcpy(&sum, &pattern, 8);
    }
    return float(sum);
}
#endif

// a * b + c rounded once: only where the reference says fma.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    Floats sum;
    for (int i = 0; i < LANES; i++) sum[i] = fused(a[i], b[i], c[i]);
    return sum;
#endif
}

// The largest whole number that is not above x; |x| < 2^31. Anything else gives some number, which the caller masks:
// minus infinity converts to INT_MIN, and the sum is taken in unsigned words, where it wraps by definition.
INLINE Ints floor_of(Floats x) {
    Ints whole = __builtin_convertvector(x, Ints);
    return (Ints)((Words)whole + (Words)(__builtin_convertvector(whole, Floats) > x));
}

// Widening and narrowing. GCC 12 turns __builtin_convertvector into shuffles or scalars for some of these widths, so
// they are spelled out where one instruction does it.
INLINE Words widen(Bytes v) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)v));
#else
    return __builtin_convertvector(v, Words);
#endif
}

INLINE Words widen(Halves v) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, Words);
#endif
}

INLINE Words sign_extend(Chars v) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepi8_epi32((__m128i)v);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)v));
#else
    return (Words)__builtin_convertvector(v, Ints);
#endif
}

INLINE Words sign_extend(Shorts v) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepi16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepi16_epi32((__m128i)v);
#else
    return (Words)__builtin_convertvector(v, Ints);
#endif
}

INLINE Bytes low_bytes(Words v) {  // the lowest byte of every lane
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
    v &= 0xffu;
    __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
#else
    return __builtin_convertvector(v, Bytes);
#endif
}

INLINE Halves narrow_to_halves(Words v) {  // every lane below 65536
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
    return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
    return __builtin_convertvector(v, Halves);
#endif
}

INLINE Halves low_halves(Words v) {  // the lower half of every lane
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)v);
#else
    return narrow_to_halves(v & 0xffffu);
#endif
}

// Stores that bypass the cache, for outputs larger than it: the line is not read first.
template <class V>
INLINE void stream(void* to, V v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)v);
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)v);
#elif defined(__AVX2__)
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)v);
#endif
#if defined(__x86_64__)
    if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)to, (__m128i)v);
#endif
    __builtin_memcpy(to, &v, sizeof(V));
}

INLINE void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

}  // namespace
