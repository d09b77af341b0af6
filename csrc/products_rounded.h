// The products by dot products of bfloat16 pairs alone: what products_fma.h offers, for calls of bfloat16 whose weights may be
// rounded to it. What torch's attention and the libraries on GPUs do, and twice products_fma.h's rate where a dot product
// costs no more than a multiply-add.
//
// Left and right operands as in products_fma.h, a step being a pair of dimensions.
// Weights: [kRows][pair of tokens], in the place of their float32. Weighted operand: [dimension panel][pair of tokens][kPanel].
#pragma once

#include "pairs.h"

namespace ringspan::RINGSPAN_ISA {

constexpr bool kPairsOnly = true;
constexpr bool kRoundsWeights = true;
constexpr bool kDsHasTwoOrders = true;  // in pairs of queries for dk, in pairs of keys for dq
constexpr bool kFetchesQueries = true;
constexpr int kKeyBlock = 128, kQueryBlock = 64, kKeysPerItem = 448;
constexpr int kTokenFloats = kPanel / 2;
static_assert(kHasPairs && kPanel == 2 * kLanes);

struct ProductUnit {};  // nothing to set up

static inline int64_t operand_floats(int64_t dim, bool) { return (dim + 1) / 2; }

static inline int64_t fetches_of_panel(int64_t dim, int64_t value_dim, bool) {
    return (operand_floats(dim, true) + kPanel - 1) / kPanel + (value_dim + kPanel - 1) / kPanel;
}

static float pack_pairs(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int width, float* to) {
    if (lie_in_pairs(x, dim)) return pack_columns(as_pairs(x), first, num_tokens, dim / 2, width, to);
    return pack_columns_in_pairs(x, first, num_tokens, dim, width, to);
}

static float pack_left(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, bool, float* to) {
    return pack_pairs(x, first, num_tokens, dim, kRows, to);
}

static float pack_right(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, bool, float* to) {
    return pack_pairs(x, first, num_tokens, dim, kPanel, to);
}

static float pack_weighted(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, int room, float* to) {
    return pack_token_pairs<1>(x, first, num_tokens, dim, pitch, room, to);
}

RINGSPAN_INLINE float weighted_at(const float* operand, int64_t pitch, int64_t token, int64_t d) {
    return bfloat16_at(operand + (d / kPanel * pitch + token) / 2 * kPanel + d % kPanel, token % 2);
}

template <int kR, int kWidth>
RINGSPAN_INLINE void multiply_registers(const float* left, const float* right, int64_t dim, float* out, Fetch& fetch) {
    Floats acc[kR][kWidth] = {};
    const int64_t num_steps = operand_floats(dim, true);
    for (int64_t n = 0; n < num_steps; n += kPanel) {
        multiply<kR, 1, kRows, true>(acc, left + n * kRows, right + n * kPanel, num_steps - n < kPanel ? num_steps - n : kPanel);
        fetch_some(fetch);
    }
    store_block(out, acc);
}

template <int kR>
RINGSPAN_INLINE void multiply_panel(const float* left, const float* right, int64_t dim, bool, int columns, float* out, Fetch& fetch) {
    if (columns > kLanes) {
        multiply_registers<kR, kVectors>(left, right, dim, out, fetch);
    } else {
        multiply_registers<kR, 1>(left, right, dim, out, fetch);
    }
}

RINGSPAN_INLINE Floats store_weights(float* to, const Floats (&row)[kVectors], Floats sum) {
    const Floats rounded = round_to_bfloat16(row[0], row[1]);
    store(to, rounded);
    const uint32_t ones = 0x3f803f80;
    float pair;
    memcpy(&pair, &ones, sizeof pair);
    return dot_pairs_broadcast(&pair, rounded, sum);
}

RINGSPAN_INLINE Floats as_seen(Floats weight) {
    const Floats rounded = round_to_bfloat16(weight, weight);
    uint16_t bits[2 * kLanes];
    memcpy(bits, &rounded, sizeof bits);
    return widen_bfloat16(bits);
}

RINGSPAN_INLINE bool weigh_while_multiplying(const float*, const float*, int64_t, int, int, float, const float*, float*, Sums*, Fetch&) { return false; }

// ds_weights is ds for dk. For dq ds is read in pairs of keys: these two rows become one.
RINGSPAN_INLINE void store_gradients(float* p, float* ds, float* ds_weights, const Floats (&weight)[2][kVectors], const Floats (&gradient)[2][kVectors]) {
    Floats rounded[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        store_weights(p + i * kPanel, weight[i], all(0));
        rounded[i] = round_to_bfloat16(gradient[i][0], gradient[i][1]);
        store(ds_weights + i * kPanel, rounded[i]);
    }
    store(ds, interleave_first(rounded[0], rounded[1]));
    store(ds + kLanes, interleave_last(rounded[0], rounded[1]));
}

template <int kR>
static void add_weighted(float* out, float* sum, const float* weights, int64_t weight_pitch, const float* values, int64_t value_pitch, int first, int last,
                         int last_tokens, int dim_panels, Fetch& fetch) {
    const int whole = last_tokens < kPanel ? last - 1 : last;
    for (int d = 0; d < dim_panels; ++d) {
        Floats acc[kR][kVectors] = {};
        const float* panels = values + d * value_pitch;
        for (int p = first; p < last; ++p) {
            const int pairs = p < whole ? kPanel / 2 : (last_tokens + 1) / 2;
            multiply<kR, kPanel, 1, true>(acc, weights + p * weight_pitch, panels + p * kPanel * kTokenFloats, pairs);
            fetch_some(fetch);
        }
        if (sum) {
            move_block(out + d * kRows * kPanel, acc, sum + d * kRows * kPanel);
        } else {
            add_block(out + d * kRows * kPanel, acc);
        }
    }
}

static void pack_keys_for_queries(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, float* to) {
    pack_weighted(x, first, num_tokens, dim, pitch, pitch, to);
}

RINGSPAN_INLINE float key_at(const float* keys, int64_t pitch, int64_t token, int64_t d) { return weighted_at(keys, pitch, token, d); }

// Rows of accumulators in the product for dq. They need not divide kPanel: the last ones are then computed twice.
constexpr int kDqRows = 11;

static void sum_over_keys(const float* ds, const float* keys, int64_t num_keys, float* sums) {
    for (int next = 0; next < kPanel; next += kDqRows) {
        const int r = next + kDqRows <= kPanel ? next : kPanel - kDqRows;
        Floats acc[kDqRows][kVectors] = {};
        multiply<kDqRows, 1, 2 * kPanel, true>(acc, ds + r, keys, (num_keys + 1) / 2);
        store_block(sums + r * kPanel, acc);
    }
}

}  // namespace ringspan::RINGSPAN_ISA
