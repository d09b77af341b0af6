// AVX2 + FMA + F16C: 8 floats in a register, 16 registers.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace ringspan::avx2 {

constexpr int kLanes = 8;
constexpr int kVectors = 2;  // 6 rows x 2 registers: 12 accumulators, 2 operands, 1 broadcast; 8 loads for 12 multiply-adds
constexpr int kRows = 6;
constexpr int kRowStep = 2;  // ragged tiles run with 2, 4, 6 rows
constexpr int kQueriesPerItem = 1024;  // packing is a transposition, dearer beside the products than on AVX-512

constexpr bool kHasPairs = false;  // no dot product of bfloat16 pairs

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

static inline Floats load(const float* p) { return (Floats)_mm256_loadu_ps(p); }
static inline void store(float* p, Floats v) { _mm256_storeu_ps(p, (__m256)v); }
static inline Floats all(float x) { return (Floats)_mm256_set1_ps(x); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline Floats multiply_add_broadcast(const float* a, Floats b, Floats c) { return multiply_add(all(*a), b, c); }

static inline Floats widen_bfloat16(const uint16_t* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return (Floats)_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

static inline Floats widen_float16(const uint16_t* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// visible ? x : y, lane by lane, for lanes with lo <= key < hi
static inline Floats where_inside(Ints key, Ints lo, Ints hi, Floats x, Floats y) {
    const __m256i before = _mm256_cmpgt_epi32((__m256i)lo, (__m256i)key);
    const __m256i visible = _mm256_andnot_si256(before, _mm256_cmpgt_epi32((__m256i)hi, (__m256i)key));
    return (Floats)_mm256_blendv_ps((__m256)y, (__m256)x, _mm256_castsi256_ps(visible));
}

// The larger lane; where x is NaN, y.
static inline Floats larger(Floats x, Floats y) { return (Floats)_mm256_max_ps((__m256)x, (__m256)y); }
static inline bool any_above(Floats x, float limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
}

// The range in which 2^floor(x) can be built from exponent bits: 2^-127 gives 0, 2^128 inf. NaN stays NaN.
static inline __m256 within_exponents(Floats x) {
    return _mm256_min_ps(_mm256_set1_ps(128), _mm256_max_ps(_mm256_set1_ps(-127), (__m256)x));
}

// x - floor(x), 0 for -inf; and p * 2^floor(x), 0 for -inf, NaN for NaN.
static inline Floats fraction(Floats x) {
    const __m256 y = within_exponents(x);
    return (Floats)_mm256_sub_ps(y, _mm256_floor_ps(y));
}

static inline Floats times_power_of_two(Floats p, Floats x) {
    const __m256i exponent = _mm256_cvttps_epi32(_mm256_floor_ps(within_exponents(x)));
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
    return (Floats)_mm256_mul_ps((__m256)p, _mm256_castsi256_ps(bits));
}

// One step of a transposition: swaps the off-diagonal quarters of 2 step x 2 step squares.
#define RINGSPAN_EXCHANGE(step, FIRST, SECOND)              \
    for (int i = 0; i < kLanes; ++i) {                      \
        if (i & step) continue;                             \
        const __m256 low = (__m256)row[i], high = (__m256)row[i + step]; \
        row[i] = (Floats)(FIRST);                           \
        row[i + step] = (Floats)(SECOND);                   \
    }

static inline void transpose(Floats (&row)[kLanes]) {
#pragma GCC unroll 8
    RINGSPAN_EXCHANGE(1, _mm256_blend_ps(low, _mm256_moveldup_ps(high), 0xaa), _mm256_blend_ps(_mm256_movehdup_ps(low), high, 0xaa))
#pragma GCC unroll 8
    RINGSPAN_EXCHANGE(2, _mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xee))
#pragma GCC unroll 8
    RINGSPAN_EXCHANGE(4, _mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))
}

#undef RINGSPAN_EXCHANGE

}  // namespace ringspan::avx2
