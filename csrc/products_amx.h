// The products by tiles of bfloat16 pairs: what products_fma.h offers, for calls of bfloat16.
//
// A tile's product with a panel is four products of 16 x 16. Inputs are as exact here as in float32, and so are their products. A
// weight is split into two bfloat16 of 8 bits, high + low, and multiplied twice: what is lost is at most 2^-17 of it, where
// one bfloat16 would lose 2^-8. Where weights may be rounded (RINGSPAN_ROUNDS_WEIGHTS), high is all there is.
//
// Left operand: rows as they are, [kRows][pair of dimensions]. Right operand: [pair of dimensions][kPanel]. Dimensions are filled
// up with zeros to whole tiles.
// Weights: [kRows][16 pairs high, 16 pairs low], pairs of the tokens i and i + 16 of a panel, in the place of their float32.
// Weighted operand: [dimension panel][pair of such tokens][kPanel].
#pragma once

#include "pairs.h"

namespace ringspan::RINGSPAN_ISA {

constexpr int kSide = 16;  // of a tile: rows, and pairs or columns
static_assert(kLanes == kSide && kPanel == 2 * kSide && kRows == 2 * kSide && kRowStep == kSide);

#ifdef RINGSPAN_ROUNDS_WEIGHTS
constexpr bool kRoundsWeights = true;
#else
constexpr bool kRoundsWeights = false;
#endif
constexpr bool kPairsOnly = true;
constexpr bool kDsHasTwoOrders = true;
constexpr bool kFetchesQueries = false;  // it gained nothing
constexpr int kKeyBlock = 256, kQueryBlock = 256, kKeysPerItem = 512;
constexpr int kTokenFloats = kSide;

using ProductUnit = TilesInUse;

static inline int64_t operand_floats(int64_t dim, bool) { return round_up(dim, 2 * kSide) / 2; }

// x = high + low, but for 2^-17 of x; the upper half of each is a bfloat16.
struct Split {
    Bits high, low;
};
RINGSPAN_INLINE Split split(Floats x) {
    const Bits high = ((Bits)x + 0x8000) & 0xffff0000;
    return {high, (Bits)(x - (Floats)high) + 0x8000};
}

// Of tokens of any strides and any number of dimensions.
static float pack_left_one_by_one(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, float* to) {
    const int64_t width = operand_floats(dim, true);
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + x.offset + first * x.token_stride;
    memset(to, 0, kRows * width * sizeof(float));
    float largest = 0;
    for (int64_t t = 0; t < num_tokens; ++t, from += x.token_stride) {
        float* row = to + t * width;
        if (x.dim_stride == 1) {
            memcpy(row, from, dim * sizeof *from);
        } else {
            for (int64_t d = 0; d < dim; ++d) memcpy(reinterpret_cast<char*>(row) + d * sizeof *from, from + d * x.dim_stride, sizeof *from);
        }
        Floats squares = {};
        for (int64_t d = 0; d < width; d += kLanes) squares = add_square(static_cast<const Bfloat16Pair*>(nullptr), load(row + d), squares);
        const float norm = sum_of(squares);
        if (!(norm < __builtin_inff())) largest = __builtin_inff();
        largest = norm > largest ? norm : largest;
    }
    return largest;
}

static inline int64_t fetches_of_panel(int64_t, int64_t, bool) { return 1; }

static float pack_left(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, bool, float* to) {
    if (!lie_in_pairs(x, dim)) return pack_left_one_by_one(x, first, num_tokens, dim, to);
    const int64_t width = operand_floats(dim, true);
    const Tokens pairs = as_pairs(x);
    const Bfloat16Pair* from = static_cast<const Bfloat16Pair*>(x.data) + pairs.offset + first * pairs.token_stride;
    Floats squares[kRows] = {};
    for (int t = 0; t < kRows; t += kSide) {
        for (int64_t d = 0; d < width; d += kSide) {
            Floats square[kLanes];
            read_square(square, from + t * pairs.token_stride + d, pairs.token_stride, 1, num_tokens - t, dim / 2 - d, Order::by_token);
#pragma GCC unroll 16
            for (int i = 0; i < kSide; ++i) {
                squares[t + i] = add_square(from, square[i], squares[t + i]);
                store(to + (t + i) * width + d, square[i]);
            }
        }
    }
    float largest = 0;
    for (const Floats& row : squares) {
        const float norm = sum_of(row);
        if (!(norm < __builtin_inff())) return __builtin_inff();
        largest = norm > largest ? norm : largest;
    }
    return largest;
}

static float pack_right(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, bool, float* to) {
    const int64_t pairs = (dim + 1) / 2;
    memset(to + pairs * kPanel, 0, (operand_floats(dim, true) - pairs) * kPanel * sizeof(float));
    if (!lie_in_pairs(x, dim)) return pack_columns_in_pairs(x, first, num_tokens, dim, kPanel, to);
    return pack_columns(as_pairs(x), first, num_tokens, dim / 2, kPanel, to);
}

static float pack_weighted(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, int room, float* to) {
    return pack_token_pairs<kSide>(x, first, num_tokens, dim, pitch, room, to);
}

RINGSPAN_INLINE float weighted_at(const float* operand, int64_t pitch, int64_t token, int64_t d) {
    const int64_t panel = (d / kPanel * pitch + token / kPanel * kPanel) * kTokenFloats, i = token % kPanel;
    return bfloat16_at(operand + panel + i % kSide * kPanel + d % kPanel, i / kSide);
}

// Tiles 0 1 2 3 are the quarters of the result, 4 5 the left operand's rows, 6 7 the right one's columns.
template <int kR>
RINGSPAN_INLINE void zero_result() {
    zero_tile<0>(), zero_tile<1>();
    if constexpr (kR > kSide) zero_tile<2>(), zero_tile<3>();
}

// The products of 16 of the left operand's rows, and of kR of them.
template <int kHalf>
RINGSPAN_INLINE void add_half(const float* left, int64_t pitch) {
    load_tile<4 + kHalf>(left + kHalf * kSide * pitch, pitch);
    multiply_tiles<2 * kHalf, 4 + kHalf, 6>(), multiply_tiles<2 * kHalf + 1, 4 + kHalf, 7>();
}

template <int kR>
RINGSPAN_INLINE void add_left(const float* left, int64_t pitch) {
    add_half<0>(left, pitch);
    if constexpr (kR > kSide) add_half<1>(left, pitch);
}

RINGSPAN_INLINE void load_right(const float* right, int64_t pitch) { load_tile<6>(right, pitch), load_tile<7>(right + kSide, pitch); }

template <int kR>
RINGSPAN_INLINE void store_result(float* out) {
    store_tile<0>(out, kPanel), store_tile<1>(out + kSide, kPanel);
    if constexpr (kR > kSide) store_tile<2>(out + kSide * kPanel, kPanel), store_tile<3>(out + kSide * kPanel + kSide, kPanel);
}

template <int kR>
RINGSPAN_INLINE void multiply_panel(const float* left, const float* right, int64_t dim, bool, int, float* out, Fetch& fetch) {
    fetch_some(fetch);
    const int64_t width = operand_floats(dim, true);
    zero_result<kR>();
    for (int64_t d = 0; d < width; d += kSide) {
        load_right(right + d * kPanel, kPanel);
        add_left<kR>(left + d, width);
    }
    store_result<kR>(out);
}

RINGSPAN_INLINE Floats store_weights(float* to, const Floats (&row)[kVectors], Floats sum) {
    const Split x = split(row[0]), y = split(row[1]);
    store(to, upper_halves(x.high, y.high));
    if (!kRoundsWeights) store(to + kSide, upper_halves(x.low, y.low));
    return kRoundsWeights ? sum + ((Floats)x.high + (Floats)y.high) : sum;
}

// Both parts have all of it that counts. A NaN keeps its bits, which rounding could carry away.
RINGSPAN_INLINE Floats as_seen(Floats weight) {
    const Bits is_number = (Bits)(weight == weight);
    return kRoundsWeights ? (Floats)((is_number & split(weight).high) | (~is_number & (Bits)weight)) : weight;
}

// Weighs rows first .. last of a panel of q . k that all of them see: 2^(scale q . k + start) in its place.
RINGSPAN_INLINE void weigh_rows(float* panel, int first, int last, float scale, const float* start, Sums* sums) {
    for (int r = first; r < last; ++r) {
        float* at = panel + r * kPanel;
        Floats row[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            row[v] = exp2(multiply_add(load(at + v * kLanes), all(scale), all(start[r])));
            sums[r].exact += row[v];
        }
        sums[r].seen = store_weights(at, row, sums[r].seen);
    }
}

// multiply_panel for the panels first .. last, and their weights, for whole tiles. The tiles compute a panel while the vector
// units weigh the one before, a few rows to each pair of products: 1.2 times as fast as one after the other.
RINGSPAN_INLINE bool weigh_while_multiplying(const float* queries, const float* keys, int64_t dim, int first, int last, float scale, const float* start,
                                             float* weights, Sums* sums, Fetch& fetch) {
    const int width = static_cast<int>(operand_floats(dim, true)), rows_at_once = (kRows * kSide / 2 + width - 1) / width;
    for (int p = first; p < last; ++p) {
        fetch_some(fetch);
        float* before = p > first ? weights + (p - 1) * kRows * kPanel : nullptr;
        int row = before ? 0 : kRows;  // the next to be weighed
        const auto weigh_some = [&] {
            const int end = row + rows_at_once < kRows ? row + rows_at_once : kRows;
            weigh_rows(before, row, end, scale, start, sums);
            row = end;
        };
        zero_result<kRows>();
        for (int d = 0; d < width; d += kSide) {
            load_right(keys + (p * width + d) * kPanel, kPanel);
            add_half<0>(queries + d, width);
            weigh_some();
            add_half<1>(queries + d, width);
            weigh_some();
        }
        store_result<kRows>(weights + p * kRows * kPanel);
    }
    if (first < last) weigh_rows(weights + (last - 1) * kRows * kPanel, 0, kRows, scale, start, sums);
    return true;
}

// ds_weights is ds for dk. For dq ds is a right operand, of pairs of keys: the two rows become one of high and one of low.
RINGSPAN_INLINE void store_gradients(float* p, float* ds, float* ds_weights, const Floats (&weight)[2][kVectors], const Floats (&gradient)[2][kVectors]) {
    Split half[2][kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        store_weights(p + i * kPanel, weight[i], all(0));
        half[i][0] = split(gradient[i][0]), half[i][1] = split(gradient[i][1]);
        store(ds_weights + i * kPanel, upper_halves(half[i][0].high, half[i][1].high));
        if (!kRoundsWeights) store(ds_weights + i * kPanel + kSide, upper_halves(half[i][0].low, half[i][1].low));
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
        store(ds + v * kLanes, upper_halves(half[0][v].high, half[1][v].high));
        if (!kRoundsWeights) store(ds + kPanel + v * kLanes, upper_halves(half[0][v].low, half[1][v].low));
    }
}

// Part `part` of num_parts of a result: to += it, or sum += to + it and to = 0.
RINGSPAN_INLINE void add_part(float* to, float* sum, const float* result, int size, int part, int num_parts) {
    const int end = size * (part + 1) / num_parts / kLanes * kLanes;
    for (int i = size * part / num_parts / kLanes * kLanes; i < end; i += kLanes) {
        const Floats added = load(to + i) + load(result + i);
        if (sum) store(sum + i, added + load(sum + i));
        store(to + i, sum ? all(0) : added);
    }
}

template <int kR>
static void add_weighted(float* out, float* sum, const float* weights, int64_t weight_pitch, const float* values, int64_t value_pitch, int first, int last, int,
                         int dim_panels, Fetch&) {
    // A result is added a part at a time while the tiles compute the next: all at once would keep them waiting.
    constexpr int kSize = kR * kPanel;
    alignas(64) float results[2][kSize];
    float* to = nullptr;  // of the result before
    for (int d = 0; d < dim_panels; ++d) {
        zero_result<kR>();
        for (int p = first; p < last; ++p) {
            load_right(values + d * value_pitch + p * kPanel * kTokenFloats, kPanel);
            add_left<kR>(weights + p * weight_pitch, kPanel);
            if (!kRoundsWeights) add_left<kR>(weights + p * weight_pitch + kSide, kPanel);
            if (to) add_part(to, sum, results[(d - 1) % 2], kSize, p - first, last - first);
        }
        store_result<kR>(results[d % 2]);
        if (to && sum) sum += kRows * kPanel;
        to = out + d * kRows * kPanel;
    }
    add_part(to, sum, results[(dim_panels - 1) % 2], kSize, 0, 1);
}

// Keys as a left operand whose rows are dimensions: [dimension panel][kPanel keys][kPanel dimensions][pair of keys]
static void pack_keys_for_queries(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, float* to) {
    const Bfloat16* from = static_cast<const Bfloat16*>(x.data) + x.offset + first * x.token_stride;
    for (int64_t t = 0; t < num_tokens; t += kPanel) {
        for (int64_t d = 0; d < round_up(dim, kPanel); d += kSide) {
            Floats square[2][kLanes];
            for (int i = 0; i < 2; ++i) {  // every other token
                const int64_t left = (num_tokens - t + 1 - i) / 2;
                read_square(square[i], from + (t + i) * x.token_stride + d * x.dim_stride, 2 * x.token_stride, x.dim_stride, left, dim - d, Order::by_dim);
            }
            float* rows = to + (d / kPanel * pitch + t) * kTokenFloats + d % kPanel * kSide;
#pragma GCC unroll 16
            for (int i = 0; i < kSide; ++i) store(rows + i * kSide, upper_halves((Bits)square[0][i], (Bits)square[1][i]));
        }
    }
}

RINGSPAN_INLINE float key_at(const float* keys, int64_t pitch, int64_t token, int64_t d) {
    const int64_t rows = (d / kPanel * pitch + token / kPanel * kPanel) * kTokenFloats;
    return bfloat16_at(keys + rows + d % kPanel * kSide + token % kPanel / 2, token % 2);
}

static void sum_over_keys(const float* ds, const float* keys, int64_t num_keys, float* sums) {
    alignas(64) float result[kPanel * kPanel];  // [dimension][query]
    zero_result<kPanel>();
    for (int64_t t = 0; t < num_keys; t += kPanel, ds += kPanel * kPanel, keys += kPanel * kTokenFloats) {
        load_right(ds, 2 * kPanel);
        add_left<kPanel>(keys, kSide);
        if (kRoundsWeights) continue;
        load_right(ds + kPanel, 2 * kPanel);
        add_left<kPanel>(keys, kSide);
    }
    store_result<kPanel>(result);
    for (int d = 0; d < kPanel; d += kSide) {
        for (int query = 0; query < kPanel; query += kSide) {
            Floats square[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kSide; ++i) square[i] = load(result + (d + i) * kPanel + query);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < kSide; ++i) store(sums + (query + i) * kPanel + d, square[i]);
        }
    }
}

}  // namespace ringspan::RINGSPAN_ISA
