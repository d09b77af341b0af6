// Fetching into L2 what comes next while something else is computed: packing waits for memory, and computing does not.
#pragma once

namespace ringspan::RINGSPAN_ISA {

// Rows of memory, as many of one array as of the others.
struct FetchedArray {
    const char* row = nullptr;      // the next
    int64_t stride = 0, bytes = 0;  // of a row
};

// A core has places for a dozen cache lines or two on their way; who asks for more at once waits. So a few are asked for at a time.
struct Fetch {
    FetchedArray arrays[3];
    int num_arrays = 0;
    int which = 0;                             // whose row is being fetched
    int64_t bytes_done = 0;                    // of it
    int64_t rows_left = 0, lines_at_once = 0;  // of all arrays
};

static FetchedArray fetched(const float* rows, int64_t stride, int64_t dim) { return {reinterpret_cast<const char*>(rows), stride * 4, dim * 4}; }

// From the token `first` on. Tokens that do not lie in one piece are not fetched.
static FetchedArray fetched(const Tokens& x, int64_t first, int64_t dim) {
    const int64_t size = x.dtype == DType::float32 ? 4 : 2;
    const char* row = static_cast<const char*>(x.data) + (x.offset + first * x.token_stride) * size;
    return {row, x.token_stride * size, x.dim_stride == 1 ? dim * size : 0};
}

// All of it is fetched in num_times calls of fetch_some.
template <int kCount>
static Fetch fetch_of(const FetchedArray (&arrays)[kCount], int64_t num_rows, int64_t num_times) {
    Fetch fetch;
    if (num_rows <= 0 || num_times == 0) return fetch;
    int64_t lines = 0;
    for (const FetchedArray& array : arrays) {
        if (array.bytes == 0) continue;
        fetch.arrays[fetch.num_arrays++] = array;
        lines += (array.bytes + 63) / 64 * num_rows;
    }
    fetch.rows_left = num_rows * fetch.num_arrays;
    fetch.lines_at_once = (lines + num_times - 1) / num_times;
    return fetch;
}

static inline void fetch_some(Fetch& fetch) {
    for (int64_t bytes_left = fetch.lines_at_once * 64; bytes_left > 0 && fetch.rows_left > 0;) {
        FetchedArray& array = fetch.arrays[fetch.which];
        const int64_t begin = fetch.bytes_done, end = array.bytes - begin < bytes_left ? array.bytes : begin + bytes_left;
        for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(array.row + at, 0, 2);
        __asm__ volatile("");  // gcc takes a function that only prefetches for one without effect, and drops its calls
        bytes_left -= round_up(end - begin, 64);
        fetch.bytes_done = end;
        if (end < array.bytes) continue;
        array.row += array.stride;
        fetch.bytes_done = 0;
        fetch.which = fetch.which + 1 < fetch.num_arrays ? fetch.which + 1 : 0;
        --fetch.rows_left;
    }
}

}  // namespace ringspan::RINGSPAN_ISA
