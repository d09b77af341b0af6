// Row intervals, cut to the keys that exist.
#pragma once

#include "attention.h"

namespace ringspan {

// lo[r], hi[r] for the rows first_row + r of head h; a row that sees nothing gets 0, 0. Rows past the last query see nothing.
void row_intervals(const Mask& mask, const Sizes& sizes, int64_t b, int64_t h, int64_t first_row, int num_rows, int32_t* lo, int32_t* hi);

// What a few neighbouring rows see together. Rows that see nothing do not count: nothing is computed for their sake.
struct Span {
    int32_t begin, end;            // no row sees a key outside of [begin, end)
    int32_t full_begin, full_end;  // every row that sees anything sees all of [full_begin, full_end)

    bool empty() const { return begin >= end; }
    bool sees(int32_t first, int32_t last) const { return first < end && last > begin; }
    bool sees_all(int32_t first, int32_t last) const { return first >= full_begin && last <= full_end; }
};

Span span_of(const int32_t* lo, const int32_t* hi, int num_rows);

}  // namespace ringspan
