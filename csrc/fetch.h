// Fetching tokens into L2 while others are computed with: packing waits for memory, and computing does not.
#pragma once

namespace ringspan::RINGSPAN_ISA {

// Two arrays' tokens, a few at a time. A core has places for a dozen lines on their way; who asks for more at once waits.
struct Fetch {
    const char *x = nullptr, *y = nullptr;  // the next token's
    int64_t x_stride = 0, y_stride = 0, x_bytes = 0, y_bytes = 0;  // of a token
    int64_t tokens_left = 0, tokens_at_once = 0;
};

// The tokens first .. last, in num_times calls of fetch_some.
static Fetch fetch_of(const Tokens& x, const Tokens& y, int64_t x_dim, int64_t y_dim, int64_t first, int64_t last, int num_times) {
    if (first >= last || num_times == 0 || x.dim_stride != 1 || y.dim_stride != 1) return {};
    const int64_t size = x.dtype == DType::float32 ? 4 : 2;
    return {static_cast<const char*>(x.data) + (x.offset + first * x.token_stride) * size,
            static_cast<const char*>(y.data) + (y.offset + first * y.token_stride) * size,
            x.token_stride * size,
            y.token_stride * size,
            x_dim * size,
            y_dim * size,
            last - first,
            (last - first + num_times - 1) / num_times};
}

static inline void fetch_some(Fetch& fetch) {
    for (int64_t i = 0; i < fetch.tokens_at_once && fetch.tokens_left > 0; ++i, --fetch.tokens_left) {
        for (int64_t at = 0; at < fetch.x_bytes; at += 64) __builtin_prefetch(fetch.x + at, 0, 2);
        for (int64_t at = 0; at < fetch.y_bytes; at += 64) __builtin_prefetch(fetch.y + at, 0, 2);
        fetch.x += fetch.x_stride;
        fetch.y += fetch.y_stride;
        __asm__ volatile("");  // gcc takes a function that only prefetches for one without effect, and drops its calls
    }
}

}  // namespace ringspan::RINGSPAN_ISA
