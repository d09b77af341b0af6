// Fetching tokens into L2 while others are computed with: packing waits for memory, and computing does not.
#pragma once

namespace ringspan::RINGSPAN_ISA {

// Two arrays' tokens, a few cache lines at a time. A core has places for a dozen lines or two on their way; who asks for more at
// once waits.
struct Fetch {
    struct Array {
        const char* token = nullptr;  // the next
        int64_t stride = 0, bytes = 0;  // of a token
    };
    Array arrays[2];
    int which = 0;  // whose token is being fetched
    int64_t at = 0;  // bytes of it that have been
    int64_t tokens_left = 0, lines_at_once = 0;  // tokens of both together
};

// The tokens first .. last, in num_times calls of fetch_some.
static Fetch fetch_of(const Tokens& x, const Tokens& y, int64_t x_dim, int64_t y_dim, int64_t first, int64_t last, int64_t num_times) {
    if (first >= last || num_times == 0 || x.dim_stride != 1 || y.dim_stride != 1) return {};
    const int64_t size = x.dtype == DType::float32 ? 4 : 2;
    const auto array_of = [&](const Tokens& tokens, int64_t dim) {
        return Fetch::Array{static_cast<const char*>(tokens.data) + (tokens.offset + first * tokens.token_stride) * size, tokens.token_stride * size, dim * size};
    };
    const int64_t num_lines = (last - first) * ((x_dim * size + 63) / 64 + (y_dim * size + 63) / 64);
    return {{array_of(x, x_dim), array_of(y, y_dim)}, 0, 0, 2 * (last - first), (num_lines + num_times - 1) / num_times};
}

static inline void fetch_some(Fetch& fetch) {
    for (int64_t i = 0; i < fetch.lines_at_once && fetch.tokens_left > 0; ++i) {
        Fetch::Array& array = fetch.arrays[fetch.which];
        __builtin_prefetch(array.token + fetch.at, 0, 2);
        fetch.at += 64;
        if (fetch.at >= array.bytes) {
            array.token += array.stride;
            fetch.at = 0;
            fetch.which = 1 - fetch.which;
            --fetch.tokens_left;
        }
        __asm__ volatile("");  // gcc takes a function that only prefetches for one without effect, and drops its calls
    }
}

}  // namespace ringspan::RINGSPAN_ISA
