// absorb_gradient: a few tiles of keys against all queries that see them, one block of queries after the other.
//
// Everything is transposed against the forward: a tile's rows are keys, a panel's columns are queries, so that dk and dv stay in
// a tile as acc does there. ds of all tiles of the work item is kept for one block of queries; dq then takes one product over
// all these keys.
#pragma once

namespace ringspan::RINGSPAN_ISA {

constexpr int kQueryBlock = 64;
constexpr int kQueryPanels = kQueryBlock / kPanel;
constexpr int kKeyTilesPerItem = 224 / kRows;
constexpr int kItemKeys = kKeyTilesPerItem * kRows;
// Rows of accumulators in the product for dq. They need not divide kPanel: the last ones are then computed twice.
constexpr int kDqRows = kRows < 8 ? 4 : kRows < 16 ? 11 : 16;
static_assert(kDqRows <= kPanel && kQueryBlock % kPanel == 0);

struct KeyTile {
    int32_t begin, end;
    int rows;
    float* keys;    // [dim][kRows], or pairs, [dim / 2][kRows]
    float* values;
    float* dk;      // [dimension panel][kRows][kPanel]
    float* dv;
};

struct QueryBlock {
    int64_t head, first_row;
    bool finite;
    Span span[kQueryPanels];
    int32_t lo[kQueryBlock], hi[kQueryBlock];
    float minus_lse[kQueryBlock];  // base 2
    float minus_delta[kQueryBlock];
    float scales[kQueryBlock];   // of the queries: scale log2(e)
    float factors[kQueryBlock];  // of dout: what minus_lse has lost
    float* query_columns;        // [query panel][dim][kPanel], times scales; or pairs as they are, [query panel][dim / 2][kPanel]
    float* dout_columns;         // the same, times factors or as they are
    float* query_rows;  // [dimension panel][kQueryBlock][kPanel]
    float* dout_rows;
};

struct GradientScratch {
    KeyTile tiles[kKeyTilesPerItem];
    int num_tiles;
    bool finite_keys;
    float* key_rows;  // [dimension panel][kItemKeys][kPanel]
    QueryBlock block;
    float* p;   // [query panel][kRows][kPanel] of one key tile
    float* ds;  // [query panel][kItemKeys][kPanel]
};

static Arena lay_out(GradientScratch& scratch, float* memory, int64_t dim) {
    Arena arena{memory};
    const int64_t padded_dim = round_up(dim, kPanel);
    for (KeyTile& tile : scratch.tiles) {
        tile.keys = arena.take(dim * kRows + kLanes);
        tile.values = arena.take(dim * kRows + kLanes);
        tile.dk = arena.take(padded_dim * kRows);
        tile.dv = arena.take(padded_dim * kRows);
    }
    scratch.key_rows = arena.take(padded_dim * kItemKeys);
    scratch.block.query_columns = arena.take(dim * kQueryBlock);
    scratch.block.dout_columns = arena.take(dim * kQueryBlock);
    scratch.block.query_rows = arena.take(padded_dim * kQueryBlock);
    scratch.block.dout_rows = arena.take(padded_dim * kQueryBlock);
    scratch.p = arena.take(kQueryBlock * kRows);
    scratch.ds = arena.take(kQueryBlock * kItemKeys);
    return arena;
}

static size_t gradient_scratch_bytes(int64_t dim) {
    GradientScratch scratch;
    return lay_out(scratch, nullptr, dim).used * sizeof(float);
}

static void pack_keys(const GradientCall& call, const GradientItem& item, GradientScratch& scratch) {
    const int64_t dim = call.sizes.dim, padded_dim = round_up(dim, kPanel), num_keys = item.last_key - item.first_key;
    const bool pairs = call.bfloat16_pairs;
    const int64_t steps = pairs ? dim / 2 : dim;
    const Tokens k = tokens_of(call.k, item.batch, item.kv_head), v = tokens_of(call.v, item.batch, item.kv_head);
    scratch.num_tiles = static_cast<int>((num_keys + kRows - 1) / kRows);
    scratch.finite_keys = true;
    for (int i = 0; i < scratch.num_tiles; ++i) {
        KeyTile& tile = scratch.tiles[i];
        tile.begin = static_cast<int32_t>(item.first_key + i * kRows);
        tile.rows = num_keys - i * kRows < kRows ? static_cast<int>(num_keys - i * kRows) : kRows;
        tile.end = tile.begin + tile.rows;
        const float largest_key = pack_columns(pairs ? as_pairs(k) : k, tile.begin, tile.rows, steps, nullptr, kRows, tile.keys);
        const float largest_value = pack_columns(pairs ? as_pairs(v) : v, tile.begin, tile.rows, steps, nullptr, kRows, tile.values);
        scratch.finite_keys &= largest_key < __builtin_inff() && largest_value < __builtin_inff();
        memset(tile.dk, 0, padded_dim * kRows * sizeof(float));
        memset(tile.dv, 0, padded_dim * kRows * sizeof(float));
    }
    pack_rows(k, item.first_key, num_keys, dim, nullptr, kItemKeys, kItemKeys, scratch.key_rows);
}

// Which keys the block's rows see. A row with lse = -inf has seen nothing in the forward.
static void look_at_rows(const GradientCall& call, int64_t b, QueryBlock& block) {
    row_intervals(call.mask, call.sizes, b, block.head, block.first_row, kQueryBlock, block.lo, block.hi);
    for (int r = 0; r < kQueryBlock; ++r) {
        if (block.lo[r] < block.hi[r] && call.lse.at(b, block.head, block.first_row + r) == -__builtin_inff()) block.lo[r] = block.hi[r] = 0;
    }
    for (int p = 0; p < kQueryPanels; ++p) {
        block.span[p] = span_of(block.lo + p * kPanel, block.hi + p * kPanel, kPanel);
        // Unlike in the forward, a row that sees nothing is added to what others share: it must always be hidden.
        for (int r = p * kPanel; r < (p + 1) * kPanel; ++r) {
            if (block.lo[r] >= block.hi[r]) block.span[p].full_end = 0;
        }
    }
}

static void pack_queries(const GradientCall& call, int64_t b, QueryBlock& block) {
    const int64_t dim = call.sizes.dim, left = call.sizes.queries - block.first_row;
    const int num_rows = left < kQueryBlock ? static_cast<int>(left) : kQueryBlock;
    block.finite = true;
    for (int r = 0; r < kQueryBlock; ++r) {
        block.scales[r] = base_two_scale(call.scale);
        block.factors[r] = 1;
        block.minus_lse[r] = block.minus_delta[r] = 0;
        if (block.lo[r] >= block.hi[r]) continue;
        const float lse = call.lse.at(b, block.head, block.first_row + r), delta = call.delta.at(b, block.head, block.first_row + r);
        // p = 2^(s - lse log2(e)) = 2^(s - product) 2^-rest: the second factor goes into dout and delta, for all that p meets.
        const float product = lse * kLog2E, rest = left_over(lse, kLog2E, kLog2ERest, product);
        if (rest == rest) block.factors[r] = exp2(-rest);
        block.minus_lse[r] = -product;
        block.minus_delta[r] = -delta * block.factors[r];
        block.finite &= __builtin_isfinite(lse) && __builtin_isfinite(delta);
    }
    const Tokens q = tokens_of(call.q, b, block.head), dout = tokens_of(call.dout, b, block.head);
    for (int first = 0; first < kQueryBlock; first += kPanel) {
        const int64_t row = block.first_row + first, rows = num_rows - first;
        if (call.bfloat16_pairs) {
            pack_columns(as_pairs(q), row, rows, dim / 2, nullptr, kPanel, block.query_columns + first * dim / 2);
            pack_columns(as_pairs(dout), row, rows, dim / 2, nullptr, kPanel, block.dout_columns + first * dim / 2);
        } else {
            pack_columns(q, row, rows, dim, block.scales, kPanel, block.query_columns + first * dim);
            pack_columns(dout, row, rows, dim, block.factors + first, kPanel, block.dout_columns + first * dim);
        }
    }
    block.finite &= pack_rows(q, block.first_row, num_rows, dim, nullptr, kQueryBlock, kQueryBlock, block.query_rows);
    block.finite &= pack_rows(dout, block.first_row, num_rows, dim, block.factors, kQueryBlock, kQueryBlock, block.dout_rows);
}

// out[key][query] = start[query] + sum over dimensions of rows[d][key] * columns[d][query]
// start comes last: where it is larger than the sums on the way, each of their roundings would be of its size.
template <int kR>
RINGSPAN_INLINE void multiply_tile(const float* rows, const float* columns, const float* start, int64_t dim, float* out) {
    Floats acc[kR][kVectors] = {};
    multiply<kR, 1, kRows>(acc, rows, columns, dim);
#pragma GCC unroll 32
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] += load(start + v * kLanes);
    }
    store_block(out, acc);
}

// out[key][query] = start[query] + factors[query] * (the same sum, from pairs)
template <int kR>
RINGSPAN_INLINE void multiply_tile_of_pairs(const float* rows, const float* columns, const float* factors, const float* start, int64_t num_pairs,
                                            float* out) {
    Floats acc[kR][kVectors] = {};
    multiply<kR, 1, kRows, true>(acc, rows, columns, num_pairs);
#pragma GCC unroll 32
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add(acc[r][v], load(factors + v * kLanes), load(start + v * kLanes));
    }
    store_block(out, acc);
}

// Scores minus lse, and dp minus delta, of one key tile and one query panel.
static void multiply_panel(const GradientCall& call, const KeyTile& tile, const QueryBlock& block, int panel, float* scores, float* dp) {
    const int64_t dim = call.sizes.dim;
    const int first = panel * kPanel;
    if (!call.bfloat16_pairs) {
        with_rows(tile.rows, [&]<int kR>() {
            multiply_tile<kR>(tile.keys, block.query_columns + first * dim, block.minus_lse + first, dim, scores);
            multiply_tile<kR>(tile.values, block.dout_columns + first * dim, block.minus_delta + first, dim, dp);
        });
    } else if constexpr (kHasPairs) {
        with_rows(tile.rows, [&]<int kR>() {
            multiply_tile_of_pairs<kR>(tile.keys, block.query_columns + first * dim / 2, block.scales + first, block.minus_lse + first, dim / 2, scores);
            multiply_tile_of_pairs<kR>(tile.values, block.dout_columns + first * dim / 2, block.factors + first, block.minus_delta + first, dim / 2, dp);
        });
    }
}

// p = 2^p, ds = p ds, in place; both 0 where the query does not see the key.
static void compute_ds(const KeyTile& tile, const QueryBlock& block, int panel, bool masked, float* p, float* ds) {
    for (int v = 0; v < kVectors; ++v) {
        Ints lo, hi;
        memcpy(&lo, block.lo + panel * kPanel + v * kLanes, sizeof lo);
        memcpy(&hi, block.hi + panel * kPanel + v * kLanes, sizeof hi);
        for (int r = 0; r < tile.rows; ++r) {
            const int at = r * kPanel + v * kLanes;
            Floats weight = exp2(load(p + at)), gradient = weight * load(ds + at);
            if (masked) {
                const Ints key = all_ints(tile.begin + r);
                weight = where_inside(key, lo, hi, weight, all(0));
                gradient = where_inside(key, lo, hi, gradient, all(0));
            }
            store(p + at, weight);
            store(ds + at, gradient);
        }
        // The rows that fill a ragged tile up take part in dv and dk.
        for (int r = tile.rows; r < kRows; ++r) store(p + r * kPanel + v * kLanes, all(0)), store(ds + r * kPanel + v * kLanes, all(0));
    }
}

// dv, dk of one key tile += its part of the pairs that the slow path may visit: visible ones only.
static void add_visible(GradientScratch& scratch, int number, int panel, int64_t dim) {
    KeyTile& tile = scratch.tiles[number];
    const QueryBlock& block = scratch.block;
    const float* p = scratch.p + panel * kRows * kPanel;
    const float* ds = scratch.ds + (panel * kItemKeys + number * kRows) * kPanel;
    for (int r = 0; r < tile.rows; ++r) {
        for (int i = 0; i < kPanel; ++i) {
            const int query = panel * kPanel + i;
            if (tile.begin + r < block.lo[query] || tile.begin + r >= block.hi[query]) continue;
            for (int64_t d = 0; d < dim; ++d) {
                const int64_t to = d / kPanel * kRows * kPanel + r * kPanel + d % kPanel;
                const int64_t from = (d / kPanel * kQueryBlock + query) * kPanel + d % kPanel;
                tile.dv[to] += p[r * kPanel + i] * block.dout_rows[from];
                tile.dk[to] += ds[r * kPanel + i] * block.query_rows[from];
            }
        }
    }
}

static void add_to_keys(GradientScratch& scratch, int number, int first, int last, bool slow, int64_t dim) {
    KeyTile& tile = scratch.tiles[number];
    const QueryBlock& block = scratch.block;
    if (slow) {
        for (int p = first; p < last; ++p) add_visible(scratch, number, p, dim);
        return;
    }
    const int dim_panels = round_up(dim, kPanel) / kPanel;
    const float* ds = scratch.ds + number * kRows * kPanel;
    with_rows(tile.rows, [&]<int kR>() {
        add_weighted<kR>(tile.dv, scratch.p, kRows * kPanel, block.dout_rows, kQueryBlock * kPanel, first, last, kPanel, dim_panels);
        add_weighted<kR>(tile.dk, ds, kItemKeys * kPanel, block.query_rows, kQueryBlock * kPanel, first, last, kPanel, dim_panels);
    });
}

// p, ds, dv and dk of one key tile and one block of queries.
static void visit_tile(const GradientCall& call, GradientScratch& scratch, int number, bool slow) {
    const int64_t dim = call.sizes.dim;
    const KeyTile& tile = scratch.tiles[number];
    const QueryBlock& block = scratch.block;
    int first = kQueryPanels, last = 0;
    for (int p = 0; p < kQueryPanels; ++p) {
        float* weights = scratch.p + p * kRows * kPanel;
        float* ds = scratch.ds + (p * kItemKeys + number * kRows) * kPanel;
        if (!block.span[p].sees(tile.begin, tile.end)) {
            memset(weights, 0, kRows * kPanel * sizeof(float));
            memset(ds, 0, kRows * kPanel * sizeof(float));
            continue;
        }
        first = p < first ? p : first;
        last = p + 1;
        multiply_panel(call, tile, block, p, weights, ds);
        compute_ds(tile, block, p, !block.span[p].sees_all(tile.begin, tile.end), weights, ds);
    }
    if (call.dk.data && first < last) add_to_keys(scratch, number, first, last, slow, dim);
}

// dq of one panel's rows += scale ds . keys over the tiles first .. last
static void add_to_queries(const GradientCall& call, int64_t b, GradientScratch& scratch, int panel, int first, int last) {
    const int64_t dim = call.sizes.dim;
    const QueryBlock& block = scratch.block;
    const float* ds = scratch.ds + (panel * kItemKeys + first * kRows) * kPanel;
    const int64_t num_keys = scratch.tiles[last - 1].end - scratch.tiles[first].begin;
    for (int64_t d = 0; d < dim; d += kPanel) {
        const float* keys = scratch.key_rows + d * kItemKeys + first * kRows * kPanel;
        float sums[kPanel * kPanel];
        for (int next = 0; next < kPanel; next += kDqRows) {
            const int r = next + kDqRows <= kPanel ? next : kPanel - kDqRows;
            Floats acc[kDqRows][kVectors] = {};
            multiply<kDqRows, 1, kPanel>(acc, ds + r, keys, num_keys);
            store_block(sums + r * kPanel, acc);
        }
        for (int r = 0; r < kPanel; ++r) {
            if (block.lo[panel * kPanel + r] >= block.hi[panel * kPanel + r]) continue;
            float* dq = call.dq.row(b, block.head, block.first_row + panel * kPanel + r) + d;
            if (d + kPanel <= dim) {
#pragma GCC unroll 4
                for (int v = 0; v < kPanel; v += kLanes) store(dq + v, multiply_add(load(sums + r * kPanel + v), all(call.scale), load(dq + v)));
            } else {
                for (int64_t i = 0; d + i < dim; ++i) dq[i] += call.scale * sums[r * kPanel + i];
            }
        }
    }
}

// The same over visible pairs only.
static void add_visible_to_queries(const GradientCall& call, int64_t b, GradientScratch& scratch, int panel, int first, int last) {
    const QueryBlock& block = scratch.block;
    const int32_t item_begin = scratch.tiles[0].begin;
    for (int r = 0; r < kPanel; ++r) {
        const int query = panel * kPanel + r;
        for (int32_t j = scratch.tiles[first].begin; j < scratch.tiles[last - 1].end; ++j) {
            if (j < block.lo[query] || j >= block.hi[query]) continue;
            float* dq = call.dq.row(b, block.head, block.first_row + query);
            const float ds = scratch.ds[(panel * kItemKeys + j - item_begin) * kPanel + r];
            for (int64_t d = 0; d < call.sizes.dim; ++d) {
                dq[d] += call.scale * (ds * scratch.key_rows[(d / kPanel * kItemKeys + j - item_begin) * kPanel + d % kPanel]);
            }
        }
    }
}

static void visit_block(const GradientCall& call, const GradientItem& item, GradientScratch& scratch, int64_t step) {
    QueryBlock& block = scratch.block;
    bool seen = false, fully_seen = true;
    look_at_rows(call, item.batch, block);
    for (const Span& span : block.span) {
        seen |= span.sees(item.first_key, item.last_key);
        fully_seen &= span.sees_all(item.first_key, item.last_key);
    }
    if (!seen) return;
    pack_queries(call, item.batch, block);
    // A value that is not finite must not meet the 0 of a pair that is hidden.
    const bool slow = !fully_seen && !(block.finite && scratch.finite_keys);
    for (int i = 0; i < scratch.num_tiles; ++i) visit_tile(call, scratch, i, slow);
    if (!call.dq.data) return;
    wait_for_earlier_keys(*item.order, item.number, step);
    for (int p = 0; p < kQueryPanels; ++p) {
        int first = 0, last = scratch.num_tiles;
        while (first < last && !block.span[p].sees(scratch.tiles[first].begin, scratch.tiles[first].end)) ++first;
        while (first < last && !block.span[p].sees(scratch.tiles[last - 1].begin, scratch.tiles[last - 1].end)) --last;
        if (first == last) continue;
        if (slow) {
            add_visible_to_queries(call, item.batch, scratch, p, first, last);
        } else {
            add_to_queries(call, item.batch, scratch, p, first, last);
        }
    }
}

static void store_key_gradients(const GradientCall& call, const GradientItem& item, const GradientScratch& scratch) {
    const int64_t dim = call.sizes.dim;
    for (int n = 0; n < scratch.num_tiles; ++n) {
        const KeyTile& tile = scratch.tiles[n];
        for (int r = 0; r < tile.rows; ++r) {
            float* dk = call.dk.row(item.batch, item.kv_head, tile.begin + r);
            float* dv = call.dv.row(item.batch, item.kv_head, tile.begin + r);
            for (int64_t d = 0; d < dim; d += kPanel) {
                const int64_t panel = d * kRows + r * kPanel;
                for (int64_t i = 0; i < kPanel && d + i < dim; ++i) {
                    dk[d + i] += call.scale * tile.dk[panel + i];
                    dv[d + i] += tile.dv[panel + i];
                }
            }
        }
    }
}

static void absorb_gradient_item(const GradientCall& call, const GradientItem& item, void* memory) {
    GradientScratch scratch;
    lay_out(scratch, static_cast<float*>(memory), call.sizes.dim);
    pack_keys(call, item, scratch);
    const int64_t num_blocks = (call.sizes.queries + kQueryBlock - 1) / kQueryBlock;
    int64_t step = 0;
    for (int64_t g = 0; g < call.sizes.group(); ++g) {
        scratch.block.head = item.kv_head * call.sizes.group() + g;
        // From the last queries to the first: under a causal mask all items start with work, one step behind each other.
        for (int64_t i = num_blocks; i-- > 0; ++step) {
            scratch.block.first_row = i * kQueryBlock;
            visit_block(call, item, scratch, step);
            finish_step(*item.order, item.number, step);
        }
    }
    if (call.dk.data) store_key_gradients(call, item, scratch);
}

}  // namespace ringspan::RINGSPAN_ISA
