// Panels, 2^x and what else the kernel's parts share.
#pragma once

namespace ringspan::RINGSPAN_ISA {

// Packed operands are cut into panels of kPanel columns.
constexpr int kPanel = kLanes * kVectors;

#define RINGSPAN_INLINE static inline __attribute__((always_inline))

constexpr int round_up(int64_t n, int step) { return static_cast<int>((n + step - 1) / step * step); }

// f.operator()<R>() for the smallest R that holds `rows`: short tiles do not pay for kRows rows.
template <int kR = kRowStep, class Function>
RINGSPAN_INLINE void with_rows(int rows, const Function& f) {
    if constexpr (kR >= kRows) {
        f.template operator()<kRows>();
    } else if (rows <= kR) {
        f.template operator()<kR>();
    } else {
        with_rows<kR + kRowStep>(rows, f);
    }
}

// 2^x with a relative error of at most 6.5e-8 (measured at 8 million x in [-126, 64]; without fused multiply-add 8.8e-8), exact
// for whole x; 0 for -inf, NaN for NaN. On [0, 1) it is the degree 6 polynomial of least relative error, 2e-9 before rounding,
// among those that are 1 at 0. Degree 5 would make it 1.5e-7 and saves nothing measurable.
RINGSPAN_INLINE Floats exp2(Floats x) {
    const Floats f = fraction(x);
    Floats p = all(0x1.c54176p-13f);
    p = multiply_add(p, f, all(0x1.46d64cp-10f));
    p = multiply_add(p, f, all(0x1.3d0b92p-7f));
    p = multiply_add(p, f, all(0x1.c68912p-5f));
    p = multiply_add(p, f, all(0x1.ebfd58p-3f));
    p = multiply_add(p, f, all(0x1.62e42cp-1f));
    p = multiply_add(p, f, all(1.0f));
    return times_power_of_two(p, x);
}

// NaN for NaN, and for inf too.
RINGSPAN_INLINE Floats at_most_0(Floats x) { return x > all(0) ? x - x : x; }

static inline float at_least(float x, float least) { return x > least ? x : least; }

RINGSPAN_INLINE float exp2(float x) { return exp2(all(x))[0]; }

// log2(e) and ln(2) as a float32 and what it leaves: products with them are followed to twice float32's precision.
constexpr float kLog2E = 0x1.715476p+0f, kLog2ERest = 0x1.4ae0cp-26f;
constexpr float kLn2 = 0x1.62e43p-1f, kLn2Rest = -0x1.05c61p-29f;

// What x * (constant + rest) has beyond `rounded`. Held within +-20: where |x| is so large that one rounding step of x is
// more than that, float32 scores are no more exact, and the factors made of it must not overflow.
static inline float left_over(float x, float constant, float rest, float rounded) {
    const float left = __builtin_fmaf(x, constant, -rounded) + x * rest;
    return left < -20 ? -20 : left > 20 ? 20 : left;
}

// The lower half of a NaN may hold all that makes it one, and products of bfloat16 see the upper half.
static inline float with_plain_nan(float x) { return x == x ? x : __builtin_nanf(""); }

static inline Ints consecutive(int32_t first) {
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = first + i;
    return lanes;
}

static inline Ints all_ints(int32_t x) { return Ints{} + x; }

static inline float sum_of(Floats v) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

// Of a row's weights, lane by lane: as they are, and as products see them.
struct Sums {
    Floats exact, seen;
};

static inline float largest_of(Floats v) {
    float largest = v[0];
    for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

}  // namespace ringspan::RINGSPAN_ISA
