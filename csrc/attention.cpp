#include "attention.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <memory>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "mask.h"
#include "threads.h"

namespace ringspan {

// Keys that the rows of a tile span. A band's first and last row tell; arrays are read.
static int64_t keys_spanned(const Mask& mask, const Sizes& sizes, int64_t b, int64_t h, int64_t first_row, int64_t num_rows) {
    if (mask.lo) {
        std::vector<int32_t> lo(num_rows), hi(num_rows);
        row_intervals(mask, sizes, b, h, first_row, static_cast<int>(num_rows), lo.data(), hi.data());
        const Span span = span_of(lo.data(), hi.data(), static_cast<int>(num_rows));
        return span.empty() ? 0 : span.end - span.begin;
    }
    const int64_t last_row = std::min(first_row + num_rows, sizes.queries) - 1;
    const int64_t begin = std::max<int64_t>(first_row + mask.lower, 0), end = std::min(last_row + mask.upper, sizes.keys);
    return std::max<int64_t>(end - begin, 0);
}

// Work items share out the tiles evenly; few tiles make smaller items, so that there are least_items to share.
static int64_t tiles_per_item(int64_t most, int64_t tiles_per_head, int64_t num_heads, int64_t least_items) {
    const int64_t limit = std::clamp<int64_t>(tiles_per_head * num_heads / least_items, 1, most);
    const int64_t num_items = (tiles_per_head + limit - 1) / limit;
    return (tiles_per_head + num_items - 1) / num_items;
}

// Whether an array can be read as pairs of neighbouring dimensions where it lies.
static bool lies_in_pairs(const Input& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 4 == 0 && x.stride[0] % 2 == 0 && x.stride[1] % 2 == 0 && x.stride[2] % 2 == 0 && x.stride[3] == 1;
}

// Whether the arrays can be multiplied as bfloat16 pairs. Tiles copy what does not lie in pairs.
static bool makes_pairs(const Kernels& isa, int64_t dim, std::initializer_list<const Input*> arrays) {
    return isa.has_pairs && std::all_of(arrays.begin(), arrays.end(), [&](const Input* x) {
        return x->dtype == DType::bfloat16 && (isa.pairs_only || (dim % 2 == 0 && lies_in_pairs(*x)));
    });
}

static const Kernels& asked_for(bool rounds_weights) { return rounds_weights ? *kernels().rounded : kernels(); }

static const Kernels& serving(const Kernels& isa, bool pairs) { return isa.pairs_only && !pairs ? *isa.rest : isa; }

// The heaviest items first: under a causal mask the last to be taken are short, and the threads end together.
// What a tile computes does not depend on the item that it is in, and so the items may depend on the number of threads.
static std::vector<AbsorbItem> plan_absorb(const AbsorbCall& call, const Kernels& isa, int num_threads) {
    const Sizes& sizes = call.sizes();
    const int64_t rows = isa.rows_per_tile, group = sizes.group();
    const int64_t num_tiles = (sizes.queries + rows - 1) / rows * group;
    const int64_t least_items = num_threads > 1 ? std::min(2 * num_threads, 16) : 1;
    const int64_t step = tiles_per_item(isa.query_tiles_per_item, num_tiles, sizes.batch * sizes.kv_heads, least_items);
    std::vector<std::pair<int64_t, AbsorbItem>> weighed;
    for (int64_t b = 0; b < sizes.batch; ++b) {
        for (int64_t kv = 0; kv < sizes.kv_heads; ++kv) {
            for (int64_t first = 0; first < num_tiles; first += step) {
                const AbsorbItem item{b, kv, first, std::min(first + step, num_tiles)};
                int64_t weight = 0;
                for (int64_t t = item.first_tile; t < item.last_tile; ++t) {
                    for (const KeyRun* run = call.runs; run != call.runs + call.num_runs; ++run) {
                        weight += keys_spanned(run->mask, run->sizes, b, kv * group + t % group, t / group * rows, rows);
                    }
                }
                if (weight > 0) weighed.emplace_back(weight, item);
            }
        }
    }
    std::stable_sort(weighed.begin(), weighed.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
    std::vector<AbsorbItem> items;
    for (const auto& [weight, item] : weighed) items.push_back(item);
    return items;
}

// Runs that are multiplied in one way.
static void absorb_alike(AbsorbCall call, const Kernels& asked, bool pairs, int num_threads) {
    call.bfloat16_pairs = pairs;
    const Kernels& isa = serving(asked, pairs);
    struct Context {
        const AbsorbCall& call;
        const Kernels& isa;
        std::vector<AbsorbItem> items;
    } context{call, isa, plan_absorb(call, isa, num_threads)};
    const Work work = [](void* pointer, int64_t i, void* scratch) {
        const auto& c = *static_cast<Context*>(pointer);
        c.isa.absorb_item(c.call, c.items[i], scratch);
    };
    run_items(num_threads, static_cast<int64_t>(context.items.size()), isa.absorb_scratch_bytes(call.sizes()), work, &context);
}

void absorb(const AbsorbCall& given, int num_threads) {
    if (given.num_runs == 0) return;
    const Sizes& sizes = given.sizes();
    if (!sizes.batch || !sizes.heads || !sizes.queries || !sizes.dim || !sizes.value_dim) return;
    const Kernels& asked = asked_for(given.rounds_weights);
    // The values are no pairs of dimensions, but those who have pairs only want them in bfloat16.
    const auto in_pairs = [&](const KeyRun& run) {
        return makes_pairs(asked, sizes.dim, {&given.q, &run.k}) && (!asked.pairs_only || run.v.dtype == DType::bfloat16);
    };
    // Which keys lie in pairs differs between shards. A run's bits must not depend on those that it comes with.
    AbsorbCall part = given;
    for (const KeyRun *end = given.runs + given.num_runs, *next; part.runs != end; part.runs = next) {
        const bool pairs = in_pairs(*part.runs);
        next = std::find_if(part.runs, end, [&](const KeyRun& run) { return in_pairs(run) != pairs; });
        part.num_runs = next - part.runs;
        absorb_alike(part, asked, pairs, num_threads);
    }
}

struct GradientOrder {
    int64_t num_steps;
    std::unique_ptr<std::atomic<int64_t>[]> steps_done;  // by item
    std::atomic<int64_t> first_unfinished{0};            // all items before it have done all steps

    GradientOrder(int64_t items, int64_t steps) : num_steps(steps), steps_done(new std::atomic<int64_t>[items]()) {}
};

// Items are taken in the order of their keys, so that those waited for have been taken before and no thread waits for ever.
void wait_for_earlier_keys(GradientOrder& order, int64_t item, int64_t step) {
    int64_t earlier = order.first_unfinished.load(std::memory_order_acquire);
    bool all_finished = true;
    for (; earlier < item; ++earlier) {
        int64_t done;
        for (int tries = 0; (done = order.steps_done[earlier].load(std::memory_order_acquire)) <= step; ++tries) {
            if (tries > 200) std::this_thread::yield();
        }
        all_finished &= done == order.num_steps;
        if (all_finished) order.first_unfinished.store(earlier + 1, std::memory_order_release);
    }
}

void finish_step(GradientOrder& order, int64_t item, int64_t step) { order.steps_done[item].store(step + 1, std::memory_order_release); }

void absorb_gradient(const GradientCall& given, int num_threads) {
    GradientCall call = given;
    const Sizes& sizes = call.sizes;
    if (!sizes.batch || !sizes.heads || !sizes.queries || !sizes.keys || !sizes.dim || !sizes.value_dim) return;
    if (!call.dq.data && !call.dk.data) return;
    const Kernels& asked = asked_for(call.rounds_weights);
    call.bfloat16_pairs = makes_pairs(asked, sizes.dim, {&call.q, &call.k}) && makes_pairs(asked, sizes.value_dim, {&call.v, &call.dout});
    const Kernels& isa = serving(asked, call.bfloat16_pairs);
    const int64_t rows = isa.rows_per_tile, num_tiles = (sizes.keys + rows - 1) / rows, num_heads = sizes.batch * sizes.kv_heads;
    // Not by the number of threads: dq is summed item by item, and its bits must not depend on them.
    const int64_t step = tiles_per_item(isa.key_tiles_per_item, num_tiles, num_heads, 16) * rows;
    const int64_t items_per_head = (sizes.keys + step - 1) / step;
    const int64_t num_steps = (sizes.queries + isa.queries_per_step - 1) / isa.queries_per_step * sizes.group();
    struct Context {
        const GradientCall& call;
        const Kernels& isa;
        std::vector<std::unique_ptr<GradientOrder>> orders;
        std::vector<GradientItem> items;
    } context{call, isa, {}, {}};
    for (int64_t head = 0; head < num_heads; ++head) context.orders.push_back(std::make_unique<GradientOrder>(items_per_head, num_steps));
    // Neighbours in the queue belong to different heads: a thread seldom has to wait for its turn at dq.
    for (int64_t number = 0; number < items_per_head; ++number) {
        for (int64_t head = 0; head < num_heads; ++head) {
            context.items.push_back({head / sizes.kv_heads, head % sizes.kv_heads, number * step, std::min((number + 1) * step, sizes.keys), number,
                                     context.orders[head].get()});
        }
    }
    const Work work = [](void* pointer, int64_t i, void* scratch) {
        const auto& c = *static_cast<Context*>(pointer);
        c.isa.absorb_gradient_item(c.call, c.items[i], scratch);
    };
    run_items(num_threads, static_cast<int64_t>(context.items.size()), isa.gradient_scratch_bytes(sizes), work, &context);
}

}  // namespace ringspan
