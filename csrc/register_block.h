// A product in registers: kR rows x kWidth registers of accumulators, from packed operands.
#pragma once

namespace ringspan::RINGSPAN_ISA {

// acc[r][:] += sum over steps n of a[n * kStepPitch + r * kRowPitch] * b[n][0 .. kPanel). With kPairs each of these numbers is
// two bfloat16 and their product is a dot product.
template <int kR, int kRowPitch, int kStepPitch, bool kPairs = false, int kWidth = kVectors>
RINGSPAN_INLINE void multiply(Floats (&acc)[kR][kWidth], const float* a, const float* b, int64_t num_steps) {
#pragma GCC unroll 2
    for (int64_t n = 0; n < num_steps; ++n, a += kStepPitch, b += kPanel) {
        Floats column[kWidth];
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 32
        for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kWidth; ++v) {
                if constexpr (kPairs) {
                    acc[r][v] = dot_pairs_broadcast(a + r * kRowPitch, column[v], acc[r][v]);
                } else {
                    acc[r][v] = multiply_add_broadcast(a + r * kRowPitch, column[v], acc[r][v]);
                }
            }
        }
    }
}

template <int kR, int kWidth>
RINGSPAN_INLINE void store_block(float* to, const Floats (&acc)[kR][kWidth]) {
#pragma GCC unroll 32
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) store(to + r * kPanel + v * kLanes, acc[r][v]);
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

// sum += from + acc; from = 0.
template <int kR>
RINGSPAN_INLINE void move_block(float* from, const Floats (&acc)[kR][kVectors], float* sum) {
#pragma GCC unroll 32
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const int at = r * kPanel + v * kLanes;
            store(sum + at, load(from + at) + acc[r][v] + load(sum + at));
            store(from + at, all(0));
        }
    }
}

}  // namespace ringspan::RINGSPAN_ISA
