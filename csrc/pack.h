// Copies of one head's tokens in cache-sized pieces, widened to float32, in the order in which the products read them.
// A row stride of a power of two would use a few of the L1 cache's sets only; packed pieces use all.
#pragma once

namespace ringspan::RINGSPAN_ISA {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
// Two neighbouring bfloat16, moved about in the clothes of one float32.
struct Bfloat16Pair {
    uint16_t bits[2];
};

RINGSPAN_INLINE Floats widen(const float* p) { return load(p); }
RINGSPAN_INLINE Floats widen(const Bfloat16* p) { return widen_bfloat16(&p->bits); }
RINGSPAN_INLINE Floats widen(const Float16* p) { return widen_float16(&p->bits); }
RINGSPAN_INLINE Floats widen(const Bfloat16Pair* p) {
    Floats pairs;
    memcpy(&pairs, p, sizeof pairs);
    return pairs;
}

// sum + x^2 of packed elements; the pointer only tells their type.
template <class Element>
RINGSPAN_INLINE Floats add_square(const Element*, Floats x, Floats sum) {
    return multiply_add(x, x, sum);
}
RINGSPAN_INLINE Floats add_square(const Bfloat16Pair*, Floats x, Floats sum) {
    const Ints bits = (Ints)x;
    const Floats first = (Floats)(bits << 16), second = (Floats)(bits & ~0xffff);
    return multiply_add(first, first, multiply_add(second, second, sum));
}

// The tokens of one batch entry and head.
struct Tokens {
    const void* data;
    DType dtype;
    int64_t offset, token_stride, dim_stride;
    bool pairs = false;  // as_pairs
};

static inline Tokens tokens_of(const Input& x, int64_t b, int64_t h) {
    return {x.data, x.dtype, b * x.stride[0] + h * x.stride[1], x.stride[2], x.stride[3]};
}

// The same bfloat16 as pairs of dimensions, half as many.
static inline Tokens as_pairs(const Tokens& x) { return {x.data, x.dtype, x.offset / 2, x.token_stride / 2, 1, true}; }

// Scratch memory, handed out piece by piece in whole cache lines. Without memory it only counts.
struct Arena {
    float* base;
    size_t used = 0;

    float* take(size_t num_floats) {
        float* piece = base ? base + used : nullptr;
        used += (num_floats + 15) / 16 * 16;
        return piece;
    }
};

// The first `count` of kLanes neighbouring elements, then zeros.
template <class Element>
RINGSPAN_INLINE Floats read_run(const Element* p, int64_t count) {
    if (count >= kLanes) return widen(p);
    Element padded[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return widen(padded);
}

enum class Order { by_token, by_dim };

// kLanes tokens x kLanes dimensions, of which num_tokens x num_dims exist and the rest are zeros.
// by_token: square[i] holds the dimensions of token i. by_dim: square[i] holds dimension i of the tokens.
template <class Element>
RINGSPAN_INLINE void read_square(Floats (&square)[kLanes], const Element* p, int64_t token_stride, int64_t dim_stride, int64_t num_tokens,
                                 int64_t num_dims, Order order) {
    const bool dims_are_neighbours = dim_stride == 1 || num_dims <= 1;
    const bool tokens_are_neighbours = token_stride == 1 || num_tokens <= 1;
    Order have = Order::by_token;
    if (num_tokens <= 0 || num_dims <= 0) {
        for (int i = 0; i < kLanes; ++i) square[i] = all(0);
        return;
    }
    if (dims_are_neighbours) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = i < num_tokens ? read_run(p + i * token_stride, num_dims) : all(0);
    } else if (tokens_are_neighbours) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = i < num_dims ? read_run(p + i * dim_stride, num_tokens) : all(0);
        have = Order::by_dim;
    } else {
        for (int i = 0; i < kLanes; ++i) {
            Element gathered[kLanes] = {};
            for (int64_t d = 0; i < num_tokens && d < num_dims && d < kLanes; ++d) gathered[d] = p[i * token_stride + d * dim_stride];
            square[i] = widen(gathered);
        }
    }
    if (have != order) transpose(square);
}

// The next kLanes dimensions, neighbours in memory, of up to kLanes tokens; zeros for missing tokens.
template <class Element>
RINGSPAN_INLINE void read_dims(Floats (&square)[kLanes], const Element* p, int64_t token_stride, int64_t num_tokens) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = i < num_tokens ? widen(p + i * token_stride) : all(0);
}

// The largest of the numbers, none of which is negative; inf if any is NaN.
static inline float largest_or_inf(Floats x) {
    float largest = 0;
    for (int i = 0; i < kLanes; ++i) {
        if (!(x[i] < __builtin_inff())) return __builtin_inff();
        largest = x[i] > largest ? x[i] : largest;
    }
    return largest;
}

template <class Element>
static float pack_columns_of(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int width, float* to) {
    const Element* from = static_cast<const Element*>(x.data) + x.offset + first * x.token_stride;
    const int64_t token_stride = x.token_stride;
    float largest = 0;
    // A column's last store may run into the next column: columns follow in order, and the tokens from the last to the first.
    for (int t = (width - 1) / kLanes * kLanes; t >= 0; t -= kLanes) {
        Floats squares[2] = {};
        int64_t d = 0;
        if (x.dim_stride == 1 && t < num_tokens) {
            for (; d + kLanes <= dim; d += kLanes) {
                Floats square[kLanes];
                read_dims(square, from + t * token_stride + d, token_stride, num_tokens - t);
                transpose(square);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    squares[i % 2] = add_square(from, square[i], squares[i % 2]);
                    store(to + (d + i) * width + t, square[i]);
                }
            }
        }
        for (; d < dim; d += kLanes) {
            Floats square[kLanes];
            read_square(square, from + t * x.token_stride + d * x.dim_stride, x.token_stride, x.dim_stride, num_tokens - t, dim - d, Order::by_dim);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                squares[i % 2] = add_square(from, square[i], squares[i % 2]);
                if (d + i < dim) store(to + (d + i) * width + t, square[i]);
            }
        }
        const float norm = largest_or_inf(squares[0] + squares[1]);
        largest = norm > largest ? norm : largest;
    }
    return largest;
}

// to[dimension][0 .. width) = the tokens' dimension; missing tokens are zeros. `to` has room for kLanes floats more. Returns the
// largest squared length, inf if any is not finite.
static float pack_columns(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int width, float* to) {
    if (x.pairs) return pack_columns_of<Bfloat16Pair>(x, first, num_tokens, dim, width, to);
    if (x.dtype == DType::bfloat16) return pack_columns_of<Bfloat16>(x, first, num_tokens, dim, width, to);
    if (x.dtype == DType::float16) return pack_columns_of<Float16>(x, first, num_tokens, dim, width, to);
    return pack_columns_of<float>(x, first, num_tokens, dim, width, to);
}

template <class Element>
static float pack_rows_of(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, int room, float* to) {
    const Element* from = static_cast<const Element*>(x.data) + x.offset + first * x.token_stride;
    const int padded_tokens = round_up(num_tokens, kPanel), padded_dim = round_up(dim, kPanel);
    const int64_t token_stride = x.token_stride;
    Floats squares[2] = {};
    for (int t = 0; t < padded_tokens && t < room; t += kLanes) {
        int d = 0;
        if (x.dim_stride == 1 && num_tokens - t >= kLanes && t + kLanes <= room) {
            for (; d + kPanel <= dim; d += kPanel) {
                const Element* read = from + t * token_stride + d;
                float* panel = to + d * pitch + t * kPanel;
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i, read += token_stride) {
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) {
                        const Floats row = widen(read + v * kLanes);
                        squares[i % 2] = multiply_add(row, row, squares[i % 2]);
                        store(panel + i * kPanel + v * kLanes, row);
                    }
                }
            }
        }
        for (; d < padded_dim; d += kLanes) {
            Floats square[kLanes];
            read_square(square, from + t * x.token_stride + d * x.dim_stride, x.token_stride, x.dim_stride, num_tokens - t, dim - d, Order::by_token);
            float* panel = to + (d / kPanel) * pitch * kPanel + d % kPanel;
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                squares[i % 2] = multiply_add(square[i], square[i], squares[i % 2]);
                if (t + i < room) store(panel + (t + i) * kPanel, square[i]);
            }
        }
    }
    const float sum = sum_of(squares[0] + squares[1]);
    return sum < __builtin_inff() ? sum : __builtin_inff();
}

// to[dimension panel][token][kPanel], dimension panels `pitch` tokens apart, with room for `room` tokens. Missing dimensions are
// zeros, and so are missing tokens up to a whole panel. Returns the sum of all squares, inf if that is not finite.
[[maybe_unused]] static float pack_rows(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, int room, float* to) {
    if (x.dtype == DType::bfloat16) return pack_rows_of<Bfloat16>(x, first, num_tokens, dim, pitch, room, to);
    if (x.dtype == DType::float16) return pack_rows_of<Float16>(x, first, num_tokens, dim, pitch, room, to);
    return pack_rows_of<float>(x, first, num_tokens, dim, pitch, room, to);
}

}  // namespace ringspan::RINGSPAN_ISA
