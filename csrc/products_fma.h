// The kernel's products by multiply-adds on float32, or by dot products of bfloat16 pairs where scores may be made of them.
// products_amx.h offers the same names.
//
// Left operand: a tile's rows, [step][kRows]. Right operand: panels of columns, [step][kPanel]. A step is a dimension, or a pair
// of dimensions. Their product is a panel of scores, [kRows][kPanel].
// Weights are such panels, a token a column. Weighted operands are what they weigh, [dimension panel][token][kPanel].
#pragma once

namespace ringspan::RINGSPAN_ISA {

constexpr bool kPairsOnly = false;
constexpr bool kRoundsWeights = false;
constexpr bool kDsHasTwoOrders = false;
constexpr bool kFetchesQueries = true;  // in the backward, before they are packed
constexpr int kKeyBlock = 128, kQueryBlock = 64;
// With their gradients they take 2 KiB each at d 128: L2 has 512 KiB on Zen 3, and 1 MiB or more where there is AVX-512.
constexpr int kKeysPerItem = kLanes < 16 ? 224 : 448;
constexpr int kTokenFloats = kPanel;  // of a token in one panel of a weighted operand

struct ProductUnit {};  // nothing to set up

// Calls of fetch_some while a panel of keys is multiplied and its values are added.
static inline int64_t fetches_of_panel(int64_t dim, int64_t value_dim, bool pairs) {
    return ((pairs ? dim / 2 : dim) + kPanel - 1) / kPanel + (value_dim + kPanel - 1) / kPanel;
}

// Floats of an operand for each row or column.
static inline int64_t operand_floats(int64_t dim, bool pairs) { return pairs ? dim / 2 : dim; }

// Both return the largest squared length, inf if any is not finite.
static float pack_left(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, bool pairs, float* to) {
    return pack_columns(pairs ? as_pairs(x) : x, first, num_tokens, operand_floats(dim, pairs), kRows, to);
}

static float pack_right(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, bool pairs, float* to) {
    return pack_columns(pairs ? as_pairs(x) : x, first, num_tokens, operand_floats(dim, pairs), kPanel, to);
}

// A weighted operand of `pitch` tokens. Returns the sum of all squares, inf if that is not finite.
static float pack_weighted(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, int room, float* to) {
    return pack_rows(x, first, num_tokens, dim, pitch, room, to);
}

RINGSPAN_INLINE float weighted_at(const float* operand, int64_t pitch, int64_t token, int64_t d) {
    return operand[(d / kPanel * pitch + token) * kPanel + d % kPanel];
}

template <int kR, int kWidth>
RINGSPAN_INLINE void multiply_registers(const float* left, const float* right, int64_t dim, bool pairs, float* out, Fetch& fetch) {
    Floats acc[kR][kWidth] = {};
    const int64_t num_steps = operand_floats(dim, kHasPairs && pairs);
    for (int64_t n = 0; n < num_steps; n += kPanel) {
        const int64_t steps = num_steps - n < kPanel ? num_steps - n : kPanel;
        if (kHasPairs && pairs) {
            multiply<kR, 1, kRows, kHasPairs>(acc, left + n * kRows, right + n * kPanel, steps);
        } else {
            multiply<kR, 1, kRows>(acc, left + n * kRows, right + n * kPanel, steps);
        }
        fetch_some(fetch);
    }
    store_block(out, acc);
}

// out[row][column] = left . right, for the first `columns` at least.
template <int kR>
RINGSPAN_INLINE void multiply_panel(const float* left, const float* right, int64_t dim, bool pairs, int columns, float* out, Fetch& fetch) {
    if (columns > kLanes) {
        multiply_registers<kR, kVectors>(left, right, dim, pairs, out, fetch);
    } else {
        multiply_registers<kR, 1>(left, right, dim, pairs, out, fetch);
    }
}

// Weights as add_weighted reads them. Where these are rounded, returns sum + what they are rounded to.
RINGSPAN_INLINE Floats store_weights(float* to, const Floats (&row)[kVectors], Floats sum) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, row[v]);
    return sum;
}

// What products see of a weight.
RINGSPAN_INLINE Floats as_seen(Floats weight) { return weight; }

// products_amx.h does; here there is one kind of unit for both.
RINGSPAN_INLINE bool weigh_while_multiplying(const float*, const float*, int64_t, int, int, float, const float*, float*, Sums*, Fetch&) { return false; }

// Two rows of p and ds: for dv, dq and dk.
RINGSPAN_INLINE void store_gradients(float* p, float* ds, float*, const Floats (&weight)[2][kVectors], const Floats (&gradient)[2][kVectors]) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            store(p + i * kPanel + v * kLanes, weight[i][v]);
            store(ds + i * kPanel + v * kLanes, gradient[i][v]);
        }
    }
}

// out[dimension panel][row][:] += sum over tokens of weights[token panel][row][token] * values[dimension panel][token][:]
// for the token panels first .. last; of the last panel, the first last_tokens tokens. weights has weight_pitch floats a token
// panel, values value_pitch a dimension panel.
// sum: not null if out is to be added to it then, and to be 0.
// The products are added up from 0 and then to `out`: one long sum would lose a digit over some thousand tokens.
template <int kR>
static void add_weighted(float* out, float* sum, const float* weights, int64_t weight_pitch, const float* values, int64_t value_pitch, int first, int last,
                         int last_tokens, int dim_panels, Fetch& fetch) {
    const int whole = last_tokens < kPanel ? last - 1 : last;
    for (int d = 0; d < dim_panels; ++d) {
        Floats acc[kR][kVectors] = {};
        const float* panels = values + d * value_pitch;
        for (int p = first; p < last; ++p) {
            multiply<kR, kPanel, 1>(acc, weights + p * weight_pitch, panels + p * kPanel * kPanel, p < whole ? kPanel : last_tokens);
            fetch_some(fetch);
        }
        if (sum) {
            move_block(out + d * kRows * kPanel, acc, sum + d * kRows * kPanel);
        } else {
            add_block(out + d * kRows * kPanel, acc);
        }
    }
}

// Keys as sum_over_keys reads them: a weighted operand of `pitch` tokens.
static void pack_keys_for_queries(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, float* to) {
    pack_rows(x, first, num_tokens, dim, pitch, pitch, to);
}

RINGSPAN_INLINE float key_at(const float* keys, int64_t pitch, int64_t token, int64_t d) { return weighted_at(keys, pitch, token, d); }

// Rows of accumulators in the product for dq. They need not divide kPanel: the last ones are then computed twice.
constexpr int kDqRows = kRows < 8 ? 4 : kRows < 16 ? 11 : 16;
static_assert(kDqRows <= kPanel);

// sums[query][dimension] = sum over keys of ds[key][query] * keys[key][dimension], a panel of each
static void sum_over_keys(const float* ds, const float* keys, int64_t num_keys, float* sums) {
    for (int next = 0; next < kPanel; next += kDqRows) {
        const int r = next + kDqRows <= kPanel ? next : kPanel - kDqRows;
        Floats acc[kDqRows][kVectors] = {};
        multiply<kDqRows, 1, kPanel>(acc, ds + r, keys, num_keys);
        store_block(sums + r * kPanel, acc);
    }
}

}  // namespace ringspan::RINGSPAN_ISA
