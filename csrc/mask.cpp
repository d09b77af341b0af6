#include "mask.h"

namespace ringspan {

static int32_t clip(int64_t value, int64_t num_keys) {
    return static_cast<int32_t>(value < 0 ? 0 : value > num_keys ? num_keys : value);
}

void row_intervals(const Mask& mask, const Sizes& sizes, int64_t b, int64_t h, int64_t first_row, int num_rows, int32_t* lo, int32_t* hi) {
    for (int r = 0; r < num_rows; ++r) {
        const int64_t i = first_row + r;
        lo[r] = hi[r] = 0;
        if (i >= sizes.queries) continue;
        int64_t low = i + mask.lower, high = i + mask.upper;
        if (mask.lo) {
            low = mask.lo[b * mask.lo_stride[0] + h * mask.lo_stride[1] + i * mask.lo_stride[2]];
            high = mask.hi[b * mask.hi_stride[0] + h * mask.hi_stride[1] + i * mask.hi_stride[2]];
        }
        const int32_t first = clip(low, sizes.keys), last = clip(high, sizes.keys);
        if (first < last) lo[r] = first, hi[r] = last;
    }
}

Span span_of(const int32_t* lo, const int32_t* hi, int num_rows) {
    Span span{INT32_MAX, 0, 0, INT32_MAX};
    for (int r = 0; r < num_rows; ++r) {
        if (lo[r] >= hi[r]) continue;
        span.begin = lo[r] < span.begin ? lo[r] : span.begin;
        span.end = hi[r] > span.end ? hi[r] : span.end;
        span.full_begin = lo[r] > span.full_begin ? lo[r] : span.full_begin;
        span.full_end = hi[r] < span.full_end ? hi[r] : span.full_end;
    }
    return span;
}

}  // namespace ringspan
