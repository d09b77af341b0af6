// Register-blocked products of packed operands, and 2^x.
#pragma once

namespace ringspan::RINGSPAN_ISA {

// Packed operands are cut into panels: kPanel columns wide, one step (a dimension or a token) after the other.
constexpr int kPanel = kLanes * kVectors;

#define RINGSPAN_INLINE static inline __attribute__((always_inline))

constexpr int round_up(int64_t n, int step) { return static_cast<int>((n + step - 1) / step * step); }

// acc[r][:] += sum over steps n of a[n * kStepPitch + r * kRowPitch] * b[n][0 .. kPanel). With kPairs each of these numbers is
// two bfloat16 and their product is a dot product.
template <int kR, int kRowPitch, int kStepPitch, bool kPairs = false>
RINGSPAN_INLINE void multiply(Floats (&acc)[kR][kVectors], const float* a, const float* b, int64_t num_steps) {
#pragma GCC unroll 2
    for (int64_t n = 0; n < num_steps; ++n, a += kStepPitch, b += kPanel) {
        Floats column[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 32
        for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                if constexpr (kPairs) {
                    acc[r][v] = dot_pairs_broadcast(a + r * kRowPitch, column[v], acc[r][v]);
                } else {
                    acc[r][v] = multiply_add_broadcast(a + r * kRowPitch, column[v], acc[r][v]);
                }
            }
        }
    }
}

template <int kR>
RINGSPAN_INLINE void store_block(float* to, const Floats (&acc)[kR][kVectors]) {
#pragma GCC unroll 32
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(to + r * kPanel + v * kLanes, acc[r][v]);
    }
}

template <int kR>
RINGSPAN_INLINE void add_block(float* to, const Floats (&acc)[kR][kVectors]) {
#pragma GCC unroll 32
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            float* at = to + r * kPanel + v * kLanes;
            store(at, load(at) + acc[r][v]);
        }
    }
}

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

// out[dimension panel][row][:] += sum over tokens of weights[token panel][row][token] * values[dimension panel][token][:]
// for the token panels first .. last; of the last panel, the first last_tokens tokens. weights has weight_pitch floats a token
// panel, values value_pitch a dimension panel.
// The products are added up from 0 and then to `out`: one long sum would lose a digit over some thousand tokens.
template <int kR>
static void add_weighted(float* out, const float* weights, int64_t weight_pitch, const float* values, int64_t value_pitch, int first, int last,
                         int last_tokens, int dim_panels) {
    const int whole = last_tokens < kPanel ? last - 1 : last;
    for (int d = 0; d < dim_panels; ++d) {
        Floats acc[kR][kVectors] = {};
        const float* panels = values + d * value_pitch;
        for (int p = first; p < whole; ++p) multiply<kR, kPanel, 1>(acc, weights + p * weight_pitch, panels + p * kPanel * kPanel, kPanel);
        if (whole < last) multiply<kR, kPanel, 1>(acc, weights + whole * weight_pitch, panels + whole * kPanel * kPanel, last_tokens);
        add_block(out + d * kRows * kPanel, acc);
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

static inline float largest_of(Floats v) {
    float largest = v[0];
    for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

}  // namespace ringspan::RINGSPAN_ISA
