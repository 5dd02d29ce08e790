/* Vectors of 16 floats, loaded from and stored to fp32, bf16 or fp8. GCC 9 and Clang 12 on; any little-endian machine,
   wide ones at once. (fp16 is no type of a model on the CPU.) */
#ifndef OCTAVO_FLOATS_H
#define OCTAVO_FLOATS_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "halves of numbers are taken apart as little-endian machines have them"
#endif

/* Products of bf16. Clang 16 crashes over a number for all lanes that is taken as bf16. */
#if defined(__AVX512BF16__) && !(defined(__clang__) && __clang_major__ < 17)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

enum type { FP32 = 0, BF16 = 1, FP8 = 2 /* e4m3 */ }; /* as in __init__.py */

typedef float vec __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));

/* 16 of the 32 lanes of two vectors. GCC has the first form from 12 on. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

INLINE int size_of(int type) { return type == FP32 ? 4 : type == FP8 ? 1 : 2; }

INLINE vec splat(float x) { return x - (vec){0}; }

/* What compilers make of __builtin_convertvector on x86 is several times slower. */
INLINE bits widen(halves x) {
#if defined(__AVX512F__)
    return (bits)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, bits);
#endif
}

INLINE halves narrow(bits x) {
#if defined(__AVX512F__)
    return (halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, halves);
#endif
}

INLINE vec choose(ints condition, vec yes, vec no) {
    return (vec)(((bits)condition & (bits)yes) | (~(bits)condition & (bits)no));
}

/* e4m3 has fp32's order of bits: shifted, it is the number times 2^-120. */
INLINE vec load_fp8(const void *from) {
    bytes x;
    memcpy(&x, from, sizeof x);
#if defined(__AVX512F__)
    bits b = (bits)_mm512_cvtepu8_epi32((__m128i)x);
#else
    bits b = __builtin_convertvector(x, bits);
#endif
    vec y = (vec)((b & 0x80) << 24 | (b & 0x7f) << 20) * 0x1p120f;
    return choose((ints)((b & 0x7f) == 0x7f), splat(__builtin_nanf("")), y);
}

/* The nearest, ties to even, at most 448; NaN stays NaN. */
INLINE void store_fp8(void *to, vec x) {
    bits sign = (bits)x >> 24 & 0x80, b = (bits)x & 0x7fffffff;
    vec magnitude = (vec)b;
    bits small = (bits)(magnitude * 512.0f + 8388608.0f) & 0xff; /* below 2^-6: a multiple of 2^-9; 2^23 rounds */
    bits normal = ((b + 0x7ffff + (b >> 20 & 1)) >> 20) - (120 << 3);
    bits code = (bits)choose((ints)(magnitude < 0x1p-6f), (vec)small, (vec)normal);
    code = (bits)choose((ints)(magnitude > 448.0f), (vec)(code * 0 + 0x7e), (vec)code);
    code = (bits)choose((ints)(x != x), (vec)(code * 0 + 0x7f), (vec)code) | sign;
#if defined(__AVX512F__)
    bytes y = (bytes)_mm512_cvtepi32_epi8((__m512i)code);
#else
    bytes y = __builtin_convertvector(code, bytes);
#endif
    memcpy(to, &y, sizeof y);
}

INLINE vec load(const void *from, int type) {
    if (type == FP32) {
        vec x;
        memcpy(&x, from, sizeof x);
        return x;
    }
    if (type == FP8) return load_fp8(from);
    halves x;
    memcpy(&x, from, sizeof x);
    return (vec)(widen(x) << 16);
}

/* Rounds to nearest, ties to even; NaN stays NaN. */
INLINE void store(void *to, vec x, int type) {
    if (type == FP32) {
        memcpy(to, &x, sizeof x);
    } else if (type == FP8) {
        store_fp8(to, x);
    } else {
        bits b = (bits)x;
        bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
        bits nan = (bits)((b & 0x7fffffff) > 0x7f800000);
        halves y = narrow((nan & 0x7fc0) | (~nan & rounded));
        memcpy(to, &y, sizeof y);
    }
}

#if HAS_BF16
/* As `store`, but what is below the normal numbers becomes 0. */
INLINE void store_bf16(uint16_t *to, vec x) { _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#endif

/* The first `count` of 16 lanes; the others are 0. */
INLINE vec load_part(const void *from, int count, int type) {
    char whole[sizeof(vec)] = {0};
    memcpy(whole, from, (size_t)count * size_of(type));
    return load(whole, type);
}

INLINE void store_part(void *to, vec x, int count, int type) {
    char whole[sizeof(vec)];
    store(whole, x, type);
    memcpy(to, whole, (size_t)count * size_of(type));
}

INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* Of x[length], which has room for a multiple of 16: what is after its end becomes -inf. NaN is passed over. */
INLINE float greatest(float *x, int64_t length) {
    for (int64_t i = length; i % LANES; i++) x[i] = -__builtin_inff();
    vec most = load(x, FP32);
    for (int64_t i = LANES; i < length; i += LANES) {
        vec y = load(x + i, FP32);
        most = choose(y > most, y, most);
    }
    float found = most[0];
    for (int i = 1; i < LANES; i++) found = most[i] > found ? most[i] : found;
    return found;
}

/* e^x within 2 ulp (Cephes' polynomial); 0 below -87, inf above 88, NaN for NaN. */
INLINE vec exponential(vec x) {
    vec bounded = choose(x > 88.0f, splat(88.0f), x);
    bounded = choose(bounded < -87.0f, splat(-87.0f), bounded);
    vec shifted = bounded * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer is in the low bits */
    vec n = shifted - 12582912.0f;
    vec r = bounded - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec scale = (vec)(((ints)shifted << 23) + 0x3f800000);
    vec y = p * scale;
    y = choose(x < -87.0f, splat(0.0f), y);
    y = choose(x > 88.0f, splat(__builtin_inff()), y);
    return choose(x != x, x, y);
}

#endif
