// What one instruction set offers: the two work items and the scratch they need. csrc/isa_*.cpp compile the same source for each.
#pragma once

#include <stddef.h>

#include "attention.h"

namespace ringspan {

// Query tiles first_tile .. last_tile of one batch entry and key/value head. Tile t holds the rows
// (t / group) * rows .. of the head t % group of the group: tiles that read the same keys are neighbours.
struct AbsorbItem {
    int64_t batch, kv_head, first_tile, last_tile;
};

// Says when a work item may add to dq: items of one key/value head add in the order of their keys, so that the sum
// does not depend on the number of threads.
struct GradientOrder;
void wait_for_earlier_keys(GradientOrder& order, int64_t item, int64_t step);
void finish_step(GradientOrder& order, int64_t item, int64_t step);

// Keys first_key .. last_key of one batch entry and key/value head: number `number` in its head's order.
struct GradientItem {
    int64_t batch, kv_head, first_key, last_key, number;
    GradientOrder* order;
};

struct Kernels {
    const char* name;
    bool has_pairs;            // dot products of bfloat16 pairs
    bool pairs_only;           // serves calls of bfloat16 alone, in any layout
    const Kernels* rest;       // where pairs_only: what serves the other calls
    const Kernels* rounded;    // what serves calls of bfloat16 whose weights may be rounded to it, or null
    int rows_per_tile;         // queries, or keys in the gradient
    int query_tiles_per_item;  // of absorb_item
    int key_tiles_per_item;    // of absorb_gradient_item
    int queries_per_step;      // of absorb_gradient_item
    size_t (*absorb_scratch_bytes)(const Sizes& sizes);
    void (*absorb_item)(const AbsorbCall&, const AbsorbItem&, void* scratch);
    size_t (*gradient_scratch_bytes)(const Sizes& sizes);
    void (*absorb_gradient_item)(const GradientCall&, const GradientItem&, void* scratch);
};

namespace amx {
extern const Kernels kernels;
}
namespace amx_rounded {  // of amx
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace avx512_rounded {  // of avx512_bf16
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}
namespace avx512_shape {  // of tests only
extern const Kernels kernels;
}
namespace avx512_rounded_shape {
extern const Kernels kernels;
}
namespace amx_shape {
extern const Kernels kernels;
}
namespace amx_rounded_shape {
extern const Kernels kernels;
}

}  // namespace ringspan
