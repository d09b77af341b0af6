// absorb: a few query tiles against all keys they see, run after run and one block of keys after the other.
//
// A block of keys and values is packed once (it stays in L2) and used by every tile of the work item. One tile's queries,
// scores and a panel of keys or values fit in L1 while it goes through scores -> weights -> weighted values.
//
// Scores are in base 2: s = scale log2(e) (q . k). A row's reference is a whole number near its largest score: the change from
// one reference to another is then an exact power of two, and moving it rounds nothing.
#pragma once

namespace ringspan::RINGSPAN_ISA {

// Queries that share one packing of the keys. Its tiles need not stay in L2: they are read one after the other.
constexpr int kQueryTilesPerItem = kQueriesPerItem / kRows;

// Scores within +-kSafeScore need no look at their maximum: 2^60 a weight overflows no sum, and below a reference of 0 the
// smallest, 2^-60, is still 66 binary orders above what float32 loses. This holds of weighted values too, of 2^31 keys, where
// the squares of a panel's values add up to something within these bounds: none is above 2^35, and some above 2^-42.
constexpr float kSafeScore = 60;
constexpr float kLeastSafeSquares = 0x1p-71f, kMostSafeSquares = 0x1p70f;
// Squares that are less may have vanished.
constexpr float kLeastSquares = 0x1p-100f;
// A reference is raised when a score is above it by more than this: weights stay below 2^8, and few blocks raise it.
constexpr float kSlack = 8;
// A score within this of a reference may stand for it.
constexpr float kNear = 40;
// So many blocks are added to acc; then it is set aside and begins anew, and so it does with every run. One sum of all would lose
// a digit over 30,000 equal keys, and two over a million: it grows, and each addition rounds it.
constexpr int kBlocksAtOnce = 64;

static inline float base_two_scale(float scale) { return static_cast<float>(scale * 1.4426950408889634); }

// A row's sum of weights is followed by that of the rounded ones, where products see those. acc is made of them and is divided
// by their sum, so that they add up to 1, while row_sum and with it lse stay exact.
constexpr int kSums = kRoundsWeights ? 2 : 1;

struct Tile {
    int64_t head, first_row;
    int rows;
    bool started;                  // queries are packed
    bool started_rows[kRows];      // whose state is here: those that have seen anything of this call
    bool references_are_positive;  // of all rows that see anything of the run
    bool all_see_something;        // of the run
    bool has_aside;                // of acc and sums, what earlier runs and blocks made of them is aside
    bool is_all_aside;             // acc and sums are 0
    int num_blocks;                // added to acc since
    float largest_query;           // squared length, times (scale log2(e))^2
    Span span;                     // of the run, as are lo and hi
    int32_t lo[kRows], hi[kRows];
    float reference[kRows];  // -inf: the row has seen nothing
    float top[kRows];        // a score near it, scale (q . k) as the backward rounds it: what row_max is to be; or -inf
    float top_above[kRows];  // that score in base 2, minus reference
    float start[kRows];      // what is added to a score: -reference, or 0
    float* queries;          // a left operand
    float* acc;              // [dimension panel][kRows][kPanel]
    float* sums;             // [kRows][kSums][kLanes], to be added up; they follow acc in memory
    float* aside;            // as acc and sums
};

static int64_t floats_of_acc(const Sizes& sizes) { return round_up(sizes.value_dim, kPanel) * kRows; }
static int64_t floats_of_sums() { return kRows * kSums * kLanes; }

// Facts are kept by panel: what a tile makes of a block must not depend on the other tiles of its work item.
struct KeyBlock {
    int32_t begin, end;
    float largest_key[kKeyBlock / kPanel];  // squared length
    float squares_of_values[kKeyBlock / kPanel];
    float* keys;    // right operands, [key panel]
    float* values;  // a weighted operand of kKeyBlock tokens
};

struct AbsorbScratch {
    Tile tiles[kQueryTilesPerItem];
    KeyBlock block;
    Fetch fetch;     // of the block that comes next
    float* weights;  // [key panel][kRows][kPanel]: q . k, then 2^(score - reference)
};

RINGSPAN_INLINE float* sums_of(const Tile& tile, int r, int which = 0) { return tile.sums + (r * kSums + which) * kLanes; }

static void set_sums(Tile& tile, int r, float sum) {
    for (int i = 0; i < kSums; ++i) {
        store(sums_of(tile, r, i), all(0));
        *sums_of(tile, r, i) = sum;
    }
}

RINGSPAN_INLINE void add_sums(Tile& tile, int r, const Sums& sums) {
    store(sums_of(tile, r), load(sums_of(tile, r)) + sums.exact);
    if (kRoundsWeights) store(sums_of(tile, r, 1), load(sums_of(tile, r, 1)) + sums.seen);
}

// Of acc: divided by the sum of the exact weights it is then what it would be, divided by that of the rounded ones.
static float rounding_factor(const Tile& tile, int r) {
    if (!kRoundsWeights) return 1;
    const float factor = sum_of(load(sums_of(tile, r))) / sum_of(load(sums_of(tile, r, 1)));
    return factor < 2 ? factor : 1;  // a sum of 0, inf or NaN speaks for itself
}

static Arena lay_out(AbsorbScratch& scratch, float* memory, const Sizes& sizes) {
    Arena arena{memory};
    const int64_t key_floats = operand_floats(sizes.dim, kPairsOnly), padded_dim = round_up(sizes.value_dim, kPanel);
    scratch.block.keys = arena.take(kKeyBlock * key_floats);
    scratch.block.values = arena.take(kKeyBlock * padded_dim / kPanel * kTokenFloats);
    scratch.weights = arena.take(kKeyBlock * kRows);
    for (Tile& tile : scratch.tiles) {
        tile.queries = arena.take(key_floats * kRows + kLanes);
        tile.acc = arena.take(floats_of_acc(sizes) + floats_of_sums());
        tile.sums = tile.acc + floats_of_acc(sizes);
        tile.aside = arena.take(floats_of_acc(sizes) + floats_of_sums());
    }
    return arena;
}

static size_t absorb_scratch_bytes(const Sizes& sizes) {
    AbsorbScratch scratch;
    return lay_out(scratch, nullptr, sizes).used * sizeof(float);
}

// to = from * factor, up to kPanel numbers
RINGSPAN_INLINE void scale_run(const float* from, float factor, int64_t count, float* to) {
    if (count >= kPanel) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, load(from + v * kLanes) * all(factor));
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
    }
}

static void load_row(const AbsorbCall& call, int64_t b, Tile& tile, int r) {
    const int64_t dim = call.sizes().value_dim, t = tile.first_row + r;
    const float row_max = call.row_max.at(b, tile.head, t);
    const bool is_new = row_max == -__builtin_inff();
    // acc e^m = acc 2^(m log2(e)) = (acc 2^fraction) 2^reference
    const float product = is_new ? 0 : row_max * kLog2E;
    tile.reference[r] = is_new ? row_max : __builtin_rintf(product);
    tile.start[r] = is_new ? 0 : -tile.reference[r];
    tile.top[r] = row_max;
    tile.top_above[r] = is_new ? 0 : product - tile.reference[r] + left_over(row_max, kLog2E, kLog2ERest, product);
    const float factor = is_new ? 0 : exp2(tile.top_above[r]);
    set_sums(tile, r, is_new ? 0 : call.row_sum.at(b, tile.head, t) * factor);
    const float* acc = call.acc.row(b, tile.head, t);
    for (int64_t d = 0; d < dim; d += kPanel) {
        float* to = tile.acc + d * kRows + r * kPanel;
        if (is_new) {
            memset(to, 0, kPanel * sizeof(float));
        } else {
            scale_run(acc + d, factor, dim - d, to);
        }
    }
    tile.started_rows[r] = true;
}

static void store_row(const AbsorbCall& call, int64_t b, const Tile& tile, int r) {
    const int64_t dim = call.sizes().value_dim, t = tile.first_row + r;
    const float sum = sum_of(load(sums_of(tile, r)));
    // Scores that were all NaN have raised no reference; the state must not look like one that has seen nothing.
    const float reference = sum != sum && tile.reference[r] == -__builtin_inff() ? 0 : tile.reference[r];
    // acc 2^reference = (acc 2^-top_above) e^top. Where one score is far above all others, lse is then this score to the last bit,
    // and its weight in the backward 1: lse has few digits after the point where scores are in the thousands.
    const bool has_top = tile.top[r] > -__builtin_inff() && __builtin_fabsf(tile.top_above[r]) <= kNear;
    // Or (acc e^rest) e^row_max, row_max being reference ln(2). A row whose scores were all -inf is as one that has seen nothing.
    const bool is_exact = reference == 0 || reference == -__builtin_inff();
    const float row_max = has_top && !is_exact ? tile.top[r] : reference * kLn2;
    const float factor = is_exact ? 1 : exp2(has_top ? -tile.top_above[r] : left_over(reference, kLn2, kLn2Rest, row_max) * kLog2E);
    call.row_max.at(b, tile.head, t) = row_max;
    call.row_sum.at(b, tile.head, t) = sum * factor;
    float* acc = call.acc.row(b, tile.head, t);
    const float acc_factor = factor * rounding_factor(tile, r);
    for (int64_t d = 0; d < dim; d += kPanel) scale_run(tile.acc + d * kRows + r * kPanel, acc_factor, dim - d, acc + d);
}

// Rounds a row's state as storing and loading it would. So runs give the same bits in one call and in several.
static void settle_row(const AbsorbCall& call, int64_t b, Tile& tile, int r) {
    store_row(call, b, tile, r);
    load_row(call, b, tile, r);
}

// Whether the rows that see something are all here, and would be stored as they are.
static bool are_settled(const Tile& tile) {
    for (int r = 0; r < tile.rows; ++r) {
        if (tile.lo[r] < tile.hi[r] && (!tile.started_rows[r] || tile.reference[r] != 0)) return false;
    }
    return !kRoundsWeights;
}

// Lanes of sums become their first, in place. A total that is added to many lanes, or has other lanes added to it, is rounded each time.
static void add_lanes(Tile& tile) {
    for (float* lanes = tile.sums; lanes < tile.sums + floats_of_sums(); lanes += kLanes) {
        const float sum = sum_of(load(lanes));
        store(lanes, all(0));
        *lanes = sum;
    }
}

// Whole again, as it is stored.
static void add_aside(const Sizes& sizes, Tile& tile) {
    tile.num_blocks = 0;
    add_lanes(tile);
    if (!tile.has_aside) return;
    const int64_t count = floats_of_acc(sizes) + floats_of_sums();
    for (int64_t i = 0; i < count; i += kLanes) store(tile.acc + i, load(tile.acc + i) + load(tile.aside + i));
    tile.has_aside = tile.is_all_aside = false;
}

// first: of the floats of acc and sums, the first that is not yet aside.
static void set_aside(const Sizes& sizes, Tile& tile, int64_t first = 0) {
    if (tile.is_all_aside) return;
    const int64_t count = floats_of_acc(sizes) + floats_of_sums();
    add_lanes(tile);
    for (int64_t i = first; i < count; i += kLanes) {
        store(tile.aside + i, tile.has_aside ? load(tile.acc + i) + load(tile.aside + i) : load(tile.acc + i));
        store(tile.acc + i, all(0));
    }
    tile.has_aside = tile.is_all_aside = true, tile.num_blocks = 0;
}

static void place_tile(const AbsorbCall& call, const AbsorbItem& item, int64_t number, Tile& tile) {
    const Sizes& sizes = call.sizes();
    tile.head = item.kv_head * sizes.group() + number % sizes.group();
    tile.first_row = number / sizes.group() * kRows;
    const int64_t left = sizes.queries - tile.first_row;
    tile.rows = left < kRows ? static_cast<int>(left) : kRows;
    tile.started = false;
    for (bool& started : tile.started_rows) started = false;
}

static void start_tile(const AbsorbCall& call, const AbsorbItem& item, Tile& tile) {
    const Sizes& sizes = call.sizes();
    const float scale = base_two_scale(call.scale);
    const Tokens q = tokens_of(call.q, item.batch, tile.head);
    const float largest_query = pack_left(q, tile.first_row, tile.rows, sizes.dim, call.bfloat16_pairs, tile.queries);
    tile.largest_query = at_least(largest_query, kLeastSquares) * scale * scale;
    // Rows that see nothing are computed with the others and never stored.
    memset(tile.acc, 0, (floats_of_acc(sizes) + floats_of_sums()) * sizeof(float));
    tile.has_aside = tile.is_all_aside = false, tile.num_blocks = 0;
    for (int r = 0; r < kRows; ++r) tile.reference[r] = tile.top[r] = -__builtin_inff(), tile.start[r] = tile.top_above[r] = 0;
    tile.started = true;
}

// What the tile's rows see of the run; those that see something for the first time are loaded.
static void look_at_run(const AbsorbCall& call, const AbsorbItem& item, const KeyRun& run, Tile& tile) {
    row_intervals(run.mask, run.sizes, item.batch, tile.head, tile.first_row, kRows, tile.lo, tile.hi);
    tile.span = span_of(tile.lo, tile.hi, kRows);
    if (tile.span.empty()) return;
    if (!tile.started) start_tile(call, item, tile);
    const bool settled = are_settled(tile);
    if (!settled) add_aside(call.sizes(), tile);
    tile.references_are_positive = false;
    tile.all_see_something = true;
    bool holds_something = false;
    for (int r = 0; r < tile.rows; ++r) {
        if (tile.lo[r] >= tile.hi[r]) {
            tile.all_see_something = false;
            if (tile.started_rows[r]) tile.span.full_end = 0;  // what others see must be hidden from it
        } else if (!tile.started_rows[r]) {
            load_row(call, item.batch, tile, r);
        } else if (!settled) {
            settle_row(call, item.batch, tile, r);
        }
        holds_something = holds_something || tile.reference[r] > -__builtin_inff();
    }
    if (holds_something) set_aside(call.sizes(), tile);
}

// Packs the panels that hold the keys begin .. end: all keys of these panels.
static void pack_block(const KeyRun& run, const AbsorbItem& item, bool pairs, int32_t begin, int32_t end, KeyBlock& block) {
    const int64_t dim = run.sizes.dim, value_dim = run.sizes.value_dim, num_keys = run.sizes.keys - block.begin;
    const Tokens k = tokens_of(run.k, item.batch, item.kv_head), v = tokens_of(run.v, item.batch, item.kv_head);
    for (int p = (begin - block.begin) / kPanel; p * kPanel < end - block.begin; ++p) {
        const int first = p * kPanel;
        const int64_t count = num_keys - first < kPanel ? num_keys - first : kPanel;
        block.largest_key[p] = pack_right(k, block.begin + first, count, dim, pairs, block.keys + first * operand_floats(dim, pairs));
        block.squares_of_values[p] = pack_weighted(v, block.begin + first, count, value_dim, kKeyBlock, kPanel, block.values + first * kTokenFloats);
    }
}

static void multiply_block(const AbsorbCall& call, const Tile& tile, const KeyBlock& block, int first, int last, int last_tokens, float* weights, Fetch& fetch) {
    const int64_t dim = call.sizes().dim, pitch = kPanel * operand_floats(dim, call.bfloat16_pairs);
    with_rows(tile.rows, [&]<int kR>() {
        for (int p = first; p < last; ++p) {
            const int seen = p + 1 < last ? kPanel : last_tokens;
            multiply_panel<kR>(tile.queries, block.keys + p * pitch, dim, call.bfloat16_pairs, seen, weights + p * kRows * kPanel, fetch);
        }
    });
}

// Scores minus references of one panel. Those of keys that a row does not see become -inf, whatever they were.
static void finish_scores(const Tile& tile, float scale, int32_t first_key, bool sees_all, float* panel) {
    for (int r = 0; r < tile.rows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            float* scores = panel + r * kPanel + v * kLanes;
            const Floats score = multiply_add(load(scores), all(scale), all(tile.start[r]));
            const Ints key = consecutive(first_key + v * kLanes);
            store(scores, sees_all ? score : where_inside(key, all_ints(tile.lo[r]), all_ints(tile.hi[r]), score, all(-__builtin_inff())));
        }
    }
}

static void scale_row(Tile& tile, int r, int64_t dim, float factor) {
    const auto scale = [&](float* at) {
        store(at, load(at) * all(factor));
        if (tile.has_aside) store(at + (tile.aside - tile.acc), load(at + (tile.aside - tile.acc)) * all(factor));
    };
    for (int64_t d = 0; d < round_up(dim, kPanel); d += kLanes) scale(tile.acc + d / kPanel * kRows * kPanel + r * kPanel + d % kPanel);
    for (int i = 0; i < kSums; ++i) scale(sums_of(tile, r, i));
}

static void move_reference(Tile& tile, int r, int64_t dim, float reference) {
    if (tile.reference[r] != -__builtin_inff()) {
        scale_row(tile, r, dim, exp2(tile.reference[r] - reference));
        tile.top_above[r] += tile.reference[r] - reference;
    }
    tile.reference[r] = reference;
    tile.start[r] = -reference;
}

// Where all scores are within +-kSafeScore, a reference of 0 or more is near enough.
static void make_references_positive(Tile& tile, const KeyBlock& block, int64_t dim) {
    bool all_positive = true;
    for (int r = 0; r < tile.rows; ++r) {
        if (tile.lo[r] >= tile.hi[r] || tile.reference[r] >= 0) continue;
        const bool sees_block = tile.lo[r] < block.end && tile.hi[r] > block.begin;
        if (sees_block) move_reference(tile, r, dim, 0);
        all_positive &= sees_block;
    }
    tile.references_are_positive = all_positive;
}

// The largest scale (q . k) that each row sees, by lanes, of products that are not finished.
static void find_tops(const Tile& tile, float scale, int32_t first_key, bool sees_all, const float* panel, Floats* tops) {
    for (int r = 0; r < tile.rows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            const Floats score = multiply_add(load(panel + r * kPanel + v * kLanes), all(scale), all(0));
            const Ints key = consecutive(first_key + v * kLanes);
            tops[r] = larger(sees_all ? score : where_inside(key, all_ints(tile.lo[r]), all_ints(tile.hi[r]), score, all(-__builtin_inff())), tops[r]);
        }
    }
}

// Raises the references of rows with a score too far above theirs, and corrects the scores. tops: as find_tops found them.
static void raise_references(Tile& tile, int64_t dim, int first, int last, const Floats* tops, float* weights) {
    for (int r = 0; r < tile.rows; ++r) {
        Floats above = all(-__builtin_inff());
        for (int p = first; p < last; ++p) {
            for (int v = 0; v < kVectors; ++v) above = larger(load(weights + p * kRows * kPanel + r * kPanel + v * kLanes), above);
        }
        const bool is_new = tile.reference[r] == -__builtin_inff();
        if (any_above(tops[r], tile.top[r])) tile.top[r] = largest_of(tops[r]), tile.top_above[r] = largest_of(above);
        if (!any_above(above, is_new ? -__builtin_inff() : kSlack)) continue;
        const float largest = __builtin_ceilf(largest_of(above)), reference = is_new ? largest : tile.reference[r] + largest;
        // A reference beyond 2^24 is rounded: scores move by as much as it does, unless that leaves them far above or below.
        const float moved = is_new ? largest : reference - tile.reference[r];
        const float shift = __builtin_fabsf(moved - largest) <= kNear - kSlack ? moved : largest;
        const float top_above = tile.top_above[r] - shift;
        move_reference(tile, r, dim, reference);
        tile.top_above[r] = top_above;
        for (int p = first; p < last; ++p) {
            for (int v = 0; v < kVectors; ++v) {
                float* scores = weights + p * kRows * kPanel + r * kPanel + v * kLanes;
                store(scores, load(scores) - all(shift));
            }
        }
    }
}

// weight = 2^(score - reference), in place; the tile's sums += those of the panels before, and the weights. Panels that are not
// finished hold products still. kPlain: they are float32, for add_visible_values.
template <bool kPlain>
static void compute_weights(Tile& tile, float scale, int first, int last, const bool* finished, const Sums* sums_before, float* weights) {
    for (int r = 0; r < tile.rows; ++r) {
        Sums sums = sums_before[r];
        for (int p = first; p < last; ++p) {
            float* scores = weights + (p * kRows + r) * kPanel;
            Floats row[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                row[v] = load(scores + v * kLanes);
                if (!finished[p]) row[v] = multiply_add(row[v], all(scale), all(tile.start[r]));
                row[v] = exp2(row[v]);
                sums.exact += row[v];
                if (kPlain) store(scores + v * kLanes, as_seen(row[v])), sums.seen += as_seen(row[v]);
            }
            if (!kPlain) sums.seen = store_weights(scores, row, sums.seen);
        }
        add_sums(tile, r, sums);
    }
}

// The first panels, as far as all rows see all of them, in one go where the products offer that. Returns the first one left.
static int weigh_seen_panels(const Tile& tile, const KeyBlock& block, int64_t dim, float scale, int first, int last, float* weights, Sums* sums,
                             Fetch& fetch) {
    int end = first;
    while (end < last && tile.span.sees_all(block.begin + end * kPanel, block.begin + (end + 1) * kPanel)) ++end;
    const bool done = weigh_while_multiplying(tile.queries, block.keys, dim, first, end, scale, tile.start, weights, sums, fetch);
    return done ? end : first;
}

// acc += weights . values over visible pairs only: a value that is not finite must not meet the weight 0 of a row that does
// not see it.
static void add_visible_values(Tile& tile, const KeyBlock& block, int64_t dim, const float* weights) {
    for (int r = 0; r < tile.rows; ++r) {
        const int32_t lo = tile.lo[r] > block.begin ? tile.lo[r] : block.begin, hi = tile.hi[r] < block.end ? tile.hi[r] : block.end;
        for (int32_t j = lo - block.begin; j < hi - block.begin; ++j) {
            const float weight = weights[j / kPanel * kRows * kPanel + r * kPanel + j % kPanel];
            for (int64_t d = 0; d < dim; ++d) {
                tile.acc[d / kPanel * kRows * kPanel + r * kPanel + d % kPanel] += weight * weighted_at(block.values, kKeyBlock, j, d);
            }
        }
    }
}

// The keys of a block that a tile sees. The panels first .. last hold them.
struct SeenKeys {
    int32_t begin, end;
    int first, last;
};

static SeenKeys seen_of(const KeyBlock& block, const Tile& tile) {
    if (!tile.span.sees(block.begin, block.end)) return {};
    const int32_t begin = tile.span.begin > block.begin ? tile.span.begin : block.begin;
    const int32_t end = tile.span.end < block.end ? tile.span.end : block.end;
    return {begin, end, (begin - block.begin) / kPanel, (end - block.begin + kPanel - 1) / kPanel};
}

static void absorb_block(const AbsorbCall& call, const KeyRun& run, Tile& tile, const KeyBlock& block, float* weights, Fetch& fetch) {
    const int64_t dim = run.sizes.dim, value_dim = run.sizes.value_dim;
    const float scale = base_two_scale(call.scale);
    const auto [begin, end, first, last] = seen_of(block, tile);
    if (first == last) return;

    if (tile.num_blocks == kBlocksAtOnce) set_aside(call.sizes(), tile);
    ++tile.num_blocks;
    tile.is_all_aside = false;
    float largest_key = kLeastSquares, most_squares = 0;
    for (int p = first; p < last; ++p) {
        largest_key = at_least(block.largest_key[p], largest_key);
        most_squares = at_least(block.squares_of_values[p], most_squares);
    }
    const bool finite_values = most_squares < __builtin_inff();
    const bool safe_values = most_squares >= kLeastSafeSquares && most_squares <= kMostSafeSquares;
    const bool safe = safe_values && tile.largest_query * largest_key <= kSafeScore * kSafeScore;
    if (safe && !tile.references_are_positive) make_references_positive(tile, block, value_dim);
    const int32_t packed_end = run.sizes.keys - block.begin < last * kPanel ? static_cast<int32_t>(run.sizes.keys) : block.begin + last * kPanel;
    // Whichever rows have been loaded: their state is to have the same bits where each run is a call.
    const bool hides_some = !tile.all_see_something || !tile.span.sees_all(block.begin + first * kPanel, packed_end);
    const bool plain = !finite_values && hides_some;
    int next = first;
    Sums sums[kRows] = {};
    if (safe && !plain && tile.rows == kRows) next = weigh_seen_panels(tile, block, dim, scale, first, last, weights, sums, fetch);
    const int last_tokens = end - block.begin - (last - 1) * kPanel;
    multiply_block(call, tile, block, next, last, last_tokens, weights, fetch);
    bool finished[kKeyBlock / kPanel];
    Floats tops[kRows];
    for (int r = 0; r < tile.rows && !safe; ++r) tops[r] = all(-__builtin_inff());
    for (int p = next; p < last; ++p) {
        const int32_t key = block.begin + p * kPanel;
        const bool sees_all = tile.span.sees_all(key, key + kPanel);
        if (!safe) find_tops(tile, call.scale, key, sees_all, weights + p * kRows * kPanel, tops);
        finished[p] = !safe || !sees_all;
        if (finished[p]) finish_scores(tile, scale, key, sees_all, weights + p * kRows * kPanel);
    }
    if (!safe) raise_references(tile, value_dim, first, last, tops, weights);
    if (plain) {
        compute_weights<true>(tile, scale, first, last, finished, sums, weights);
        return add_visible_values(tile, block, value_dim, weights);
    }
    compute_weights<false>(tile, scale, next, last, finished, sums, weights);
    // The run's last block spares set_aside another way through acc.
    float* const aside = tile.has_aside && block.end >= tile.span.end ? tile.aside : nullptr;
    with_rows(tile.rows, [&]<int kR>() {
        add_weighted<kR>(tile.acc, aside, weights, kRows * kPanel, block.values, kKeyBlock * kTokenFloats, first, last, last_tokens,
                         round_up(value_dim, kPanel) / kPanel, fetch);
    });
    if (aside) set_aside(call.sizes(), tile, floats_of_acc(call.sizes()));
}

static Fetch fetch_block(const KeyRun& run, const AbsorbItem& item, int64_t begin, int64_t end, int64_t num_times) {
    const int64_t num_keys = end - begin < kKeyBlock ? end - begin : kKeyBlock;
    const Tokens k = tokens_of(run.k, item.batch, item.kv_head), v = tokens_of(run.v, item.batch, item.kv_head);
    return fetch_of({fetched(k, begin, run.sizes.dim), fetched(v, begin, run.sizes.value_dim)}, num_keys, num_times);
}

// next: the run that comes after it, or null.
static void absorb_run(const AbsorbCall& call, const AbsorbItem& item, const KeyRun& run, const KeyRun* next, int num_tiles, AbsorbScratch& scratch) {
    int32_t begin = INT32_MAX, end = 0;
    for (int i = 0; i < num_tiles; ++i) {
        Tile& tile = scratch.tiles[i];
        look_at_run(call, item, run, tile);
        begin = tile.span.begin < begin ? tile.span.begin : begin;
        end = tile.span.end > end ? tile.span.end : end;
    }
    KeyBlock& block = scratch.block;
    for (block.begin = begin / kKeyBlock * kKeyBlock; block.begin < end; block.begin += kKeyBlock) {
        block.end = end - block.begin < kKeyBlock ? end : block.begin + kKeyBlock;
        int32_t first = INT32_MAX, last = 0;  // what the tiles see of the block
        int64_t num_times = 0;
        for (int i = 0; i < num_tiles; ++i) {
            const SeenKeys seen = seen_of(block, scratch.tiles[i]);
            if (seen.first == seen.last) continue;
            first = seen.begin < first ? seen.begin : first;
            last = seen.end > last ? seen.end : last;
            num_times += (seen.last - seen.first) * fetches_of_panel(run.sizes.dim, run.sizes.value_dim, call.bfloat16_pairs);
        }
        if (num_times == 0) continue;
        pack_block(run, item, call.bfloat16_pairs, first, last, block);
        scratch.fetch = block.end < end            ? fetch_block(run, item, block.end, end, num_times)
                        : next && next->sizes.keys ? fetch_block(*next, item, 0, next->sizes.keys, num_times)
                                                   : Fetch{};
        for (int i = 0; i < num_tiles; ++i) absorb_block(call, run, scratch.tiles[i], block, scratch.weights, scratch.fetch);
    }
}

static void absorb_item(const AbsorbCall& call, const AbsorbItem& item, void* memory) {
    AbsorbScratch scratch;
    lay_out(scratch, static_cast<float*>(memory), call.sizes());
    [[maybe_unused]] const ProductUnit unit;
    const int num_tiles = static_cast<int>(item.last_tile - item.first_tile);
    for (int i = 0; i < num_tiles; ++i) place_tile(call, item, item.first_tile + i, scratch.tiles[i]);
    for (int64_t n = 0; n < call.num_runs; ++n) absorb_run(call, item, call.runs[n], n + 1 < call.num_runs ? &call.runs[n + 1] : nullptr, num_tiles, scratch);
    for (int i = 0; i < num_tiles; ++i) {
        if (scratch.tiles[i].started) add_aside(call.sizes(), scratch.tiles[i]);
        for (int r = 0; r < kRows; ++r) {
            if (scratch.tiles[i].started_rows[r]) store_row(call, item.batch, scratch.tiles[i], r);
        }
    }
}

}  // namespace ringspan::RINGSPAN_ISA
