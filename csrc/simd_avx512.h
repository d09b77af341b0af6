// AVX-512 (F, BW, DQ, VL): 16 floats in a register, 32 registers. The file that includes this says how many rows a tile has:
// RINGSPAN_ROWS, RINGSPAN_ROW_STEP, RINGSPAN_QUERIES_PER_ITEM; and whether bfloat16 is multiplied in pairs: RINGSPAN_PAIRS.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace ringspan::RINGSPAN_ISA {

constexpr int kLanes = 16;
constexpr int kVectors = 2;
constexpr int kRows = RINGSPAN_ROWS;
constexpr int kRowStep = RINGSPAN_ROW_STEP;
constexpr int kQueriesPerItem = RINGSPAN_QUERIES_PER_ITEM;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

static inline Floats load(const float* p) { return (Floats)_mm512_loadu_ps(p); }
static inline void store(float* p, Floats v) { _mm512_storeu_ps(p, (__m512)v); }
static inline Floats all(float x) { return (Floats)_mm512_set1_ps(x); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline Floats multiply_add_broadcast(const float* a, Floats b, Floats c) { return multiply_add(all(*a), b, c); }

constexpr bool kHasPairs = RINGSPAN_PAIRS;
#ifdef __AVX512BF16__
// c + the dot products of bfloat16 pairs, in float32
static inline Floats dot_pairs_broadcast(const float* a, Floats b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)b, (__m512bh)all(*a));
}

// 32 bfloat16, those of x and then those of y: rounded to nearest, ties to even; denormals become 0.
static inline Floats round_to_bfloat16(Floats x, Floats y) { return (Floats)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }

// The first or last 16 of 32 bfloat16 of x, each with its neighbour of y.
static inline Floats interleave_first(Floats x, Floats y) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return (Floats)_mm512_permutex2var_epi16((__m512i)x, order, (__m512i)y);
}
static inline Floats interleave_last(Floats x, Floats y) {
    const __m512i order = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    return (Floats)_mm512_permutex2var_epi16((__m512i)x, order, (__m512i)y);
}
#endif

static inline Floats widen_bfloat16(const uint16_t* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return (Floats)_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

static inline Floats widen_float16(const uint16_t* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// visible ? x : y, lane by lane, for lanes with lo <= key < hi
static inline Floats where_inside(Ints key, Ints lo, Ints hi, Floats x, Floats y) {
    const __mmask16 visible = _mm512_cmple_epi32_mask((__m512i)lo, (__m512i)key) & _mm512_cmplt_epi32_mask((__m512i)key, (__m512i)hi);
    return (Floats)_mm512_mask_blend_ps(visible, (__m512)y, (__m512)x);
}

// The larger lane; where x is NaN, y.
static inline Floats larger(Floats x, Floats y) { return (Floats)_mm512_max_ps((__m512)x, (__m512)y); }
static inline bool any_above(Floats x, float limit) { return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0; }

// x - floor(x), 0 for -inf; and p * 2^floor(x), 0 for -inf, NaN for NaN.
static inline Floats fraction(Floats x) { return (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
static inline Floats times_power_of_two(Floats p, Floats x) { return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x); }

// One step of a transposition: swaps the off-diagonal quarters of 2 step x 2 step squares.
#define RINGSPAN_EXCHANGE(step)                                                                       \
    for (int i = 0; i < kLanes; ++i) {                                                                \
        if (i & step) continue;                                                                       \
        const Floats low = row[i], high = row[i + step];                                              \
        row[i] = (Floats)_mm512_permutex2var_ps((__m512)low, first##step, (__m512)high);              \
        row[i + step] = (Floats)_mm512_permutex2var_ps((__m512)low, second##step, (__m512)high);      \
    }

static inline void transpose(Floats (&row)[kLanes]) {
    const __m512i first1 = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    const __m512i second1 = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    const __m512i first2 = _mm512_setr_epi32(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    const __m512i second2 = _mm512_setr_epi32(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    const __m512i first4 = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const __m512i second4 = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512i first8 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const __m512i second8 = _mm512_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 16
    RINGSPAN_EXCHANGE(1)
#pragma GCC unroll 16
    RINGSPAN_EXCHANGE(2)
#pragma GCC unroll 16
    RINGSPAN_EXCHANGE(4)
#pragma GCC unroll 16
    RINGSPAN_EXCHANGE(8)
}

#undef RINGSPAN_EXCHANGE

}  // namespace ringspan::RINGSPAN_ISA
