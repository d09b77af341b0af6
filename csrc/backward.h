// absorb_gradient: a few tiles of keys against all queries that see them, one block of queries after the other.
//
// Everything is transposed against the forward: a tile's rows are keys, a panel's columns are queries, so that dk and dv stay in
// a tile as acc does there. ds of all tiles of the work item is kept for one block of queries; dq then takes one product over
// all these keys.
#pragma once

namespace ringspan::RINGSPAN_ISA {

constexpr int kQueryPanels = kQueryBlock / kPanel;
constexpr int kKeyTilesPerItem = kKeysPerItem / kRows;
constexpr int kItemKeys = kKeyTilesPerItem * kRows;
// So many blocks of queries are added to dk and dv of a tile before these are added to the caller's, as in the forward.
constexpr int kQueryBlocksAtOnce = 128;
static_assert(kQueryBlock % kPanel == 0 && kRows % 2 == 0);

struct KeyTile {
    int32_t begin, end;
    int rows;
    float* keys;    // left operands
    float* values;
    float* dk;      // [dimension panel][kRows][kPanel]
    float* dv;
};

struct QueryBlock {
    int64_t head, first_row;
    bool finite;
    Span span[kQueryPanels];
    int32_t lo[kQueryBlock], hi[kQueryBlock];
    float minus_lse[kQueryBlock];
    float minus_delta[kQueryBlock];
    float* query_columns;  // right operands, [query panel]
    float* dout_columns;
    float* query_rows;  // weighted operands
    float* dout_rows;
};

struct GradientScratch {
    KeyTile tiles[kKeyTilesPerItem];
    int num_tiles;
    bool finite_keys;
    float* key_rows;  // what ds weighs, of kItemKeys tokens
    QueryBlock block;
    Fetch fetch;     // what is fetched while a block is computed
    float* p;        // [query panel][kRows][kPanel] of one key tile
    float* ds;       // [query panel][kItemKeys][kPanel]
    float* ds_rows;  // as p, where dk reads ds in another order than dq

    float* ds_weights(int tile, int panel) const {
        return kDsHasTwoOrders ? ds_rows + panel * kRows * kPanel : ds + (panel * kItemKeys + tile * kRows) * kPanel;
    }
    static constexpr int64_t ds_weights_pitch() { return kDsHasTwoOrders ? kRows * kPanel : kItemKeys * kPanel; }
};

static Arena lay_out(GradientScratch& scratch, float* memory, const Sizes& sizes) {
    Arena arena{memory};
    const int64_t key_floats = operand_floats(sizes.dim, kPairsOnly), value_floats = operand_floats(sizes.value_dim, kPairsOnly);
    const int64_t padded_dim = round_up(sizes.dim, kPanel), padded_value_dim = round_up(sizes.value_dim, kPanel);
    for (KeyTile& tile : scratch.tiles) {
        tile.keys = arena.take(key_floats * kRows + kLanes);
        tile.values = arena.take(value_floats * kRows + kLanes);
        tile.dk = arena.take(padded_dim * kRows);
        tile.dv = arena.take(padded_value_dim * kRows);
    }
    scratch.key_rows = arena.take(padded_dim / kPanel * kItemKeys * kTokenFloats);
    scratch.block.query_columns = arena.take(key_floats * kQueryBlock);
    scratch.block.dout_columns = arena.take(value_floats * kQueryBlock);
    scratch.block.query_rows = arena.take(padded_dim / kPanel * kQueryBlock * kTokenFloats);
    scratch.block.dout_rows = arena.take(padded_value_dim / kPanel * kQueryBlock * kTokenFloats);
    scratch.p = arena.take(kQueryBlock * kRows);
    scratch.ds = arena.take(kQueryBlock * kItemKeys);
    scratch.ds_rows = arena.take(kDsHasTwoOrders ? kQueryBlock * kRows : 0);
    return arena;
}

static size_t gradient_scratch_bytes(const Sizes& sizes) {
    GradientScratch scratch;
    return lay_out(scratch, nullptr, sizes).used * sizeof(float);
}

static void clear_key_gradients(const Sizes& sizes, GradientScratch& scratch) {
    for (int i = 0; i < scratch.num_tiles; ++i) {
        memset(scratch.tiles[i].dk, 0, round_up(sizes.dim, kPanel) * kRows * sizeof(float));
        memset(scratch.tiles[i].dv, 0, round_up(sizes.value_dim, kPanel) * kRows * sizeof(float));
    }
}

static void pack_keys(const GradientCall& call, const GradientItem& item, GradientScratch& scratch) {
    const int64_t dim = call.sizes.dim, value_dim = call.sizes.value_dim, num_keys = item.last_key - item.first_key;
    const Tokens k = tokens_of(call.k, item.batch, item.kv_head), v = tokens_of(call.v, item.batch, item.kv_head);
    scratch.num_tiles = static_cast<int>((num_keys + kRows - 1) / kRows);
    scratch.finite_keys = true;
    for (int i = 0; i < scratch.num_tiles; ++i) {
        KeyTile& tile = scratch.tiles[i];
        tile.begin = static_cast<int32_t>(item.first_key + i * kRows);
        tile.rows = num_keys - i * kRows < kRows ? static_cast<int>(num_keys - i * kRows) : kRows;
        tile.end = tile.begin + tile.rows;
        const float largest_key = pack_left(k, tile.begin, tile.rows, dim, call.bfloat16_pairs, tile.keys);
        const float largest_value = pack_left(v, tile.begin, tile.rows, value_dim, call.bfloat16_pairs, tile.values);
        scratch.finite_keys &= largest_key < __builtin_inff() && largest_value < __builtin_inff();
    }
    clear_key_gradients(call.sizes, scratch);
    pack_keys_for_queries(k, item.first_key, num_keys, dim, kItemKeys, scratch.key_rows);
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
    const int64_t dim = call.sizes.dim, value_dim = call.sizes.value_dim, left = call.sizes.queries - block.first_row;
    const int num_rows = left < kQueryBlock ? static_cast<int>(left) : kQueryBlock;
    block.finite = true;
    for (int r = 0; r < kQueryBlock; ++r) {
        block.minus_lse[r] = block.minus_delta[r] = 0;
        if (block.lo[r] >= block.hi[r]) continue;
        const float lse = with_plain_nan(call.lse.at(b, block.head, block.first_row + r));
        const float delta = with_plain_nan(call.delta.at(b, block.head, block.first_row + r));
        block.minus_lse[r] = -lse;
        block.minus_delta[r] = -delta;
        block.finite &= __builtin_isfinite(lse) && __builtin_isfinite(delta);
    }
    const Tokens q = tokens_of(call.q, b, block.head), dout = tokens_of(call.dout, b, block.head);
    for (int first = 0; first < kQueryBlock; first += kPanel) {
        const int64_t row = block.first_row + first, rows = num_rows - first;
        const bool pairs = call.bfloat16_pairs;
        pack_right(q, row, rows, dim, pairs, block.query_columns + first * operand_floats(dim, pairs));
        pack_right(dout, row, rows, value_dim, pairs, block.dout_columns + first * operand_floats(value_dim, pairs));
    }
    block.finite &= pack_weighted(q, block.first_row, num_rows, dim, kQueryBlock, kQueryBlock, block.query_rows) < __builtin_inff();
    block.finite &= pack_weighted(dout, block.first_row, num_rows, value_dim, kQueryBlock, kQueryBlock, block.dout_rows) < __builtin_inff();
}

// Scores and dp of one key tile and one query panel.
static void multiply_queries(const GradientCall& call, const KeyTile& tile, const QueryBlock& block, int panel, float* scores, float* dp, Fetch& fetch) {
    const int64_t dim = call.sizes.dim, value_dim = call.sizes.value_dim;
    const bool pairs = call.bfloat16_pairs;
    const float* queries = block.query_columns + panel * kPanel * operand_floats(dim, pairs);
    const float* douts = block.dout_columns + panel * kPanel * operand_floats(value_dim, pairs);
    with_rows(tile.rows, [&]<int kR>() {
        multiply_panel<kR>(tile.keys, queries, dim, pairs, kPanel, scores, fetch);
        multiply_panel<kR>(tile.values, douts, value_dim, pairs, kPanel, dp, fetch);
    });
}

// p = e^(scale p - lse), ds = p (ds - delta), in place; both 0 where the query does not see the key.
// lse and delta come last: where they are larger than the sums on the way, each of their roundings would be of that size. The
// score is rounded before, as for the forward's tops: of the only key that counts it is lse, and p is 1. No p is more, though
// rounding of scores in the millions says so.
// kPlain: both are float32, for add_visible and add_visible_to_queries.
template <bool kPlain>
static void compute_ds(const KeyTile& tile, const QueryBlock& block, int panel, float scale, bool masked, float* p, float* ds, float* ds_weights) {
    // The rows that fill a ragged tile up take part in dv, dk and dq, as zeros.
    for (int r = 0; r < kRows; r += 2) {
        Floats weight[2][kVectors] = {}, gradient[2][kVectors] = {};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            if (r + i >= tile.rows) continue;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const int query = panel * kPanel + v * kLanes, at = (r + i) * kPanel + v * kLanes;
                Floats& x = weight[i][v];
                const Floats score = multiply_add(load(p + at), all(scale), all(0));
                x = exp2(at_most_0((score + load(block.minus_lse + query)) * all(kLog2E)));
                Floats& y = gradient[i][v];
                y = x * (load(ds + at) + load(block.minus_delta + query));
                if (masked) {
                    Ints lo, hi;
                    memcpy(&lo, block.lo + query, sizeof lo);
                    memcpy(&hi, block.hi + query, sizeof hi);
                    const Ints key = all_ints(tile.begin + r + i);
                    x = where_inside(key, lo, hi, x, all(0));
                    y = where_inside(key, lo, hi, y, all(0));
                }
                if (kPlain) store(p + at, as_seen(x)), store(ds + at, as_seen(y));
            }
        }
        if (!kPlain) store_gradients(p + r * kPanel, ds + r * kPanel, ds_weights + r * kPanel, weight, gradient);
    }
}

// dv, dk of one key tile += its part of the pairs that the slow path may visit: visible ones only.
static void add_visible(GradientScratch& scratch, int number, int panel, const Sizes& sizes) {
    KeyTile& tile = scratch.tiles[number];
    const QueryBlock& block = scratch.block;
    const float* p = scratch.p + panel * kRows * kPanel;
    const float* ds = scratch.ds + (panel * kItemKeys + number * kRows) * kPanel;
    for (int r = 0; r < tile.rows; ++r) {
        for (int i = 0; i < kPanel; ++i) {
            const int query = panel * kPanel + i;
            if (tile.begin + r < block.lo[query] || tile.begin + r >= block.hi[query]) continue;
            const auto add = [&](float* to, int64_t dim, float weight, const float* weighed) {
                for (int64_t d = 0; d < dim; ++d) to[d / kPanel * kRows * kPanel + r * kPanel + d % kPanel] += weight * weighted_at(weighed, kQueryBlock, query, d);
            };
            add(tile.dv, sizes.value_dim, p[r * kPanel + i], block.dout_rows);
            add(tile.dk, sizes.dim, ds[r * kPanel + i], block.query_rows);
        }
    }
}

static void add_to_keys(GradientScratch& scratch, int number, int first, int last, bool slow, const Sizes& sizes) {
    KeyTile& tile = scratch.tiles[number];
    const QueryBlock& block = scratch.block;
    if (slow) {
        for (int p = first; p < last; ++p) add_visible(scratch, number, p, sizes);
        return;
    }
    const int dim_panels = round_up(sizes.dim, kPanel) / kPanel, value_panels = round_up(sizes.value_dim, kPanel) / kPanel;
    constexpr int kPitch = kQueryBlock * kTokenFloats;
    Fetch& fetch = scratch.fetch;
    with_rows(tile.rows, [&]<int kR>() {
        add_weighted<kR>(tile.dv, nullptr, scratch.p, kRows * kPanel, block.dout_rows, kPitch, first, last, kPanel, value_panels, fetch);
        add_weighted<kR>(tile.dk, nullptr, scratch.ds_weights(number, 0), scratch.ds_weights_pitch(), block.query_rows, kPitch, first, last, kPanel, dim_panels, fetch);
    });
}

// p, ds, dv and dk of one key tile and one block of queries.
static void visit_tile(const GradientCall& call, GradientScratch& scratch, int number, bool slow) {
    const KeyTile& tile = scratch.tiles[number];
    const QueryBlock& block = scratch.block;
    const auto compute = slow ? compute_ds<true> : compute_ds<false>;
    int first = kQueryPanels, last = 0;
    for (int panel = 0; panel < kQueryPanels; ++panel) {
        float* p = scratch.p + panel * kRows * kPanel;
        float* ds = scratch.ds + (panel * kItemKeys + number * kRows) * kPanel;
        float* ds_weights = scratch.ds_weights(number, panel);
        if (!block.span[panel].sees(tile.begin, tile.end)) {
            float* const all_of_it[] = {p, ds, ds_weights};
            for (float* nothing : all_of_it) memset(nothing, 0, kRows * kPanel * sizeof(float));
            continue;
        }
        first = panel < first ? panel : first;
        last = panel + 1;
        multiply_queries(call, tile, block, panel, p, ds, scratch.fetch);
        compute(tile, block, panel, call.scale, !block.span[panel].sees_all(tile.begin, tile.end), p, ds, ds_weights);
    }
    if (call.dk.data && first < last) add_to_keys(scratch, number, first, last, slow, call.sizes);
}

// dq of one panel's rows += scale ds . keys over the tiles first .. last
static void add_to_queries(const GradientCall& call, int64_t b, GradientScratch& scratch, int panel, int first, int last) {
    const int64_t dim = call.sizes.dim;
    const QueryBlock& block = scratch.block;
    const float* ds = scratch.ds + (panel * kItemKeys + first * kRows) * kPanel;
    const int64_t num_keys = scratch.tiles[last - 1].end - scratch.tiles[first].begin;
    for (int64_t d = 0; d < dim; d += kPanel) {
        const float* keys = scratch.key_rows + (d / kPanel * kItemKeys + first * kRows) * kTokenFloats;
        alignas(64) float sums[kPanel * kPanel];
        sum_over_keys(ds, keys, num_keys, sums);
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
                dq[d] += call.scale * (ds * key_at(scratch.key_rows, kItemKeys, j - item_begin, d));
            }
        }
    }
}

// What the next block's queries are packed from; and dq of this one's, which it takes up again after other items.
static Fetch fetch_queries(const GradientCall& call, const GradientItem& item, const GradientScratch& scratch) {
    const Sizes& sizes = call.sizes;
    const int64_t head = scratch.block.head, row = scratch.block.first_row, next = row - kQueryBlock;
    if (!kFetchesQueries || next < 0) return {};
    const FetchedArray q = fetched(tokens_of(call.q, item.batch, head), next, sizes.dim);
    const FetchedArray dout = fetched(tokens_of(call.dout, item.batch, head), next, sizes.value_dim);
    const FetchedArray dq = call.dq.data ? fetched(call.dq.row(item.batch, head, row), call.dq.stride[2], sizes.dim) : FetchedArray{};
    const int64_t num_times = fetches_of_panel(sizes.dim, sizes.value_dim, call.bfloat16_pairs) * (call.dk.data ? 2 : 1);
    return fetch_of({q, dout, dq}, kQueryBlock, num_times * scratch.num_tiles * kQueryPanels);
}

// Whether any key of the item is seen.
static bool visit_block(const GradientCall& call, const GradientItem& item, GradientScratch& scratch, int64_t step) {
    QueryBlock& block = scratch.block;
    bool seen = false, fully_seen = true;
    look_at_rows(call, item.batch, block);
    for (const Span& span : block.span) {
        seen |= span.sees(item.first_key, item.last_key);
        fully_seen &= span.sees_all(item.first_key, item.last_key);
    }
    if (!seen) return false;
    pack_queries(call, item.batch, block);
    // A value that is not finite must not meet the 0 of a pair that is hidden.
    const bool slow = !fully_seen && !(block.finite && scratch.finite_keys);
    scratch.fetch = fetch_queries(call, item, scratch);
    for (int i = 0; i < scratch.num_tiles; ++i) visit_tile(call, scratch, i, slow);
    if (!call.dq.data) return true;
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
    return true;
}

static void store_key_gradients(const GradientCall& call, const GradientItem& item, const GradientScratch& scratch) {
    const auto add_row = [](const float* from, int r, float scale, int64_t dim, float* to) {
        for (int64_t d = 0; d < dim; d += kPanel) {
            const float* panel = from + d * kRows + r * kPanel;
            for (int64_t i = 0; i < kPanel && d + i < dim; ++i) to[d + i] += scale * panel[i];
        }
    };
    for (int n = 0; n < scratch.num_tiles; ++n) {
        const KeyTile& tile = scratch.tiles[n];
        for (int r = 0; r < tile.rows; ++r) {
            add_row(tile.dk, r, call.scale, call.sizes.dim, call.dk.row(item.batch, item.kv_head, tile.begin + r));
            add_row(tile.dv, r, 1, call.sizes.value_dim, call.dv.row(item.batch, item.kv_head, tile.begin + r));
        }
    }
}

static void absorb_gradient_item(const GradientCall& call, const GradientItem& item, void* memory) {
    GradientScratch scratch;
    lay_out(scratch, static_cast<float*>(memory), call.sizes);
    [[maybe_unused]] const ProductUnit unit;
    pack_keys(call, item, scratch);
    const int64_t num_blocks = (call.sizes.queries + kQueryBlock - 1) / kQueryBlock;
    int64_t step = 0;
    int blocks_added = 0;
    for (int64_t g = 0; g < call.sizes.group(); ++g) {
        scratch.block.head = item.kv_head * call.sizes.group() + g;
        // From the last queries to the first: under a causal mask all items start with work, one step behind each other.
        for (int64_t i = num_blocks; i-- > 0; ++step) {
            scratch.block.first_row = i * kQueryBlock;
            const bool seen = visit_block(call, item, scratch, step);
            finish_step(*item.order, item.number, step);
            if (!seen || !call.dk.data || ++blocks_added < kQueryBlocksAtOnce) continue;
            store_key_gradients(call, item, scratch);
            clear_key_gradients(call.sizes, scratch);
            blocks_added = 0;
        }
    }
    if (call.dk.data) store_key_gradients(call, item, scratch);
}

}  // namespace ringspan::RINGSPAN_ISA
