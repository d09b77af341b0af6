// Compiler vectors and plain C++, for any number of lanes. The file that includes this says how many, and the shape of the
// register block: RINGSPAN_LANES, RINGSPAN_VECTORS, RINGSPAN_ROWS, RINGSPAN_ROW_STEP, RINGSPAN_QUERIES_PER_ITEM, RINGSPAN_PAIRS.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ringspan::RINGSPAN_ISA {

constexpr int kLanes = RINGSPAN_LANES;
constexpr int kVectors = RINGSPAN_VECTORS;
constexpr int kRows = RINGSPAN_ROWS;
constexpr int kRowStep = RINGSPAN_ROW_STEP;
constexpr int kQueriesPerItem = RINGSPAN_QUERIES_PER_ITEM;

constexpr bool kHasPairs = RINGSPAN_PAIRS;  // dot products of bfloat16 pairs

typedef float Floats __attribute__((vector_size(4 * RINGSPAN_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * RINGSPAN_LANES)));

static inline Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
static inline Floats all(float x) { return x - Floats{}; }  // -0 stays -0
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
static inline Floats multiply_add_broadcast(const float* a, Floats b, Floats c) { return all(*a) * b + c; }

// c + the dot products of bfloat16 pairs.
static inline Floats dot_pairs_broadcast(const float* a, Floats b, Floats c) {
    const Ints x = (Ints)all(*a), y = (Ints)b;
    const Ints high = Ints{} - 0x10000;
    return (Floats)(x << 16) * (Floats)(y << 16) + (Floats)(x & high) * (Floats)(y & high) + c;
}

// 2 kLanes bfloat16, those of x and then those of y: rounded to nearest, ties to even.
static inline Floats round_to_bfloat16(Floats x, Floats y) {
    uint16_t rounded[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) {
        const float value = i < kLanes ? x[i] : y[i - kLanes];
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        rounded[i] = static_cast<uint16_t>(value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
    }
    Floats pairs;
    memcpy(&pairs, rounded, sizeof pairs);
    return pairs;
}

// The first or last kLanes of 2 kLanes bfloat16 of x, each with its neighbour of y.
static inline Floats interleave(Floats x, Floats y, int first) {
    uint16_t from[2][2 * kLanes], to[2 * kLanes];
    memcpy(from[0], &x, sizeof x);
    memcpy(from[1], &y, sizeof y);
    for (int i = 0; i < 2 * kLanes; ++i) to[i] = from[i % 2][first + i / 2];
    Floats pairs;
    memcpy(&pairs, to, sizeof pairs);
    return pairs;
}
static inline Floats interleave_first(Floats x, Floats y) { return interleave(x, y, 0); }
static inline Floats interleave_last(Floats x, Floats y) { return interleave(x, y, kLanes); }

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float float_of_float16(uint32_t half) {
    const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Moved to the place of a float32's exponent and fraction, only the bias of the exponent is wrong: 2^(127 - 15).
    // The product is exact for denormal halves too.
    return float_of(sign | magnitude << 13) * 0x1p112f;
}

static inline Floats widen_bfloat16(const uint16_t* p) {
    Floats v;
    for (int i = 0; i < kLanes; ++i) v[i] = float_of(uint32_t{p[i]} << 16);
    return v;
}

static inline Floats widen_float16(const uint16_t* p) {
    Floats v;
    for (int i = 0; i < kLanes; ++i) v[i] = float_of_float16(p[i]);
    return v;
}

// condition ? x : y, lane by lane, for lanes of all ones or all zeros
static inline Floats where(Ints condition, Floats x, Floats y) { return (Floats)((condition & (Ints)x) | (~condition & (Ints)y)); }

// visible ? x : y, lane by lane, for lanes with lo <= key < hi
static inline Floats where_inside(Ints key, Ints lo, Ints hi, Floats x, Floats y) { return where((lo <= key) & (key < hi), x, y); }

// The larger lane; where x is NaN, y.
static inline Floats larger(Floats x, Floats y) { return where(x > y, x, y); }
static inline bool any_above(Floats x, float limit) {
    bool found = false;
    for (int i = 0; i < kLanes; ++i) found |= x[i] > limit;
    return found;
}

// floor(x) within the range in which 2^floor(x) can be built from exponent bits: 2^-127 gives 0, 2^128 inf.
static inline Ints floor_exponent(Floats x) {
    Floats y = where(x >= all(-127), x, all(-127));  // NaN too: its fraction carries the NaN on
    y = where(y <= all(128), y, all(128));
    const Ints toward_zero = __builtin_convertvector(y, Ints);
    return toward_zero + (Ints)(__builtin_convertvector(toward_zero, Floats) > y);  // a true comparison is -1
}

// x - floor(x), 0 for -inf; and p * 2^floor(x), 0 for -inf, NaN for NaN.
static inline Floats fraction(Floats x) {
    const Floats y = where(x < all(-127), all(-127), where(x > all(128), all(128), x));
    return y - __builtin_convertvector(floor_exponent(x), Floats);
}
static inline Floats times_power_of_two(Floats p, Floats x) { return p * (Floats)((floor_exponent(x) + 127) << 23); }

static inline void transpose(Floats (&row)[kLanes]) {
    float copy[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) store(copy[i], row[i]);
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) row[i][j] = copy[j][i];
    }
}

}  // namespace ringspan::RINGSPAN_ISA
