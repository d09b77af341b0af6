// Pairs of bfloat16, in the clothes of one float32.
#pragma once

namespace ringspan::RINGSPAN_ISA {

typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

// The upper halves of x and y as pairs.
RINGSPAN_INLINE Floats upper_halves(Bits x, Bits y) { return (Floats)(x >> 16 | (y & 0xffff0000)); }

RINGSPAN_INLINE float bfloat16_at(const float* pair, int64_t which) {
    uint32_t bits;
    memcpy(&bits, pair, sizeof bits);
    bits = which ? bits & 0xffff0000 : bits << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// What pack_columns makes of pairs, of tokens of any strides and any number of dimensions.
static float pack_columns_in_pairs(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int width, float* to) {
    const Bfloat16* from = static_cast<const Bfloat16*>(x.data) + x.offset + first * x.token_stride;
    float largest = 0;
    for (int t = (width - 1) / kLanes * kLanes; t >= 0; t -= kLanes) {
        Floats squares[2] = {};
        for (int64_t d = 0; d < dim; d += kLanes) {
            Floats square[kLanes];
            read_square(square, from + t * x.token_stride + d * x.dim_stride, x.token_stride, x.dim_stride, num_tokens - t, dim - d, Order::by_dim);
#pragma GCC unroll 8
            for (int i = 0; i < kLanes; i += 2) {
                for (int j = 0; j < 2; ++j) squares[j] = multiply_add(square[i + j], square[i + j], squares[j]);
                if (d + i < dim) store(to + (d + i) / 2 * width + t, upper_halves((Bits)square[i], (Bits)square[i + 1]));
            }
        }
        const float norm = largest_or_inf(squares[0] + squares[1]);
        largest = norm > largest ? norm : largest;
    }
    return largest;
}

static bool lie_in_pairs(const Tokens& x, int64_t dim) {
    return x.dim_stride == 1 && dim % 2 == 0 && x.offset % 2 == 0 && x.token_stride % 2 == 0 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
}

// A weighted operand of `pitch` tokens, [dimension panel][pair of tokens][kPanel]: of the tokens i and i + kApart of each panel,
// which are neighbours or half a panel apart. Missing tokens, up to a whole panel, and dimensions are zeros. Returns the
// sum of all squares, inf if that is not finite.
template <int kApart>
static float pack_token_pairs(const Tokens& x, int64_t first, int64_t num_tokens, int64_t dim, int pitch, int room, float* to) {
    static_assert(kPanel == 2 * kLanes && (kApart == 1 || kApart == kLanes));
    constexpr int kStep = kApart == 1 ? 2 : 1;  // from a pair's first token to the next pair's
    const Bfloat16* from = static_cast<const Bfloat16*>(x.data) + x.offset + first * x.token_stride;
    Floats squares[2] = {};
    for (int64_t t = 0; t < num_tokens && t < room; t += kPanel) {
        for (int64_t d = 0; d < round_up(dim, kPanel); d += kLanes) {
            Floats square[2][kLanes];
            for (int i = 0; i < 2; ++i) {
                const int64_t token = t + i * kApart;
                read_square(square[i], from + token * x.token_stride + d * x.dim_stride, kStep * x.token_stride, x.dim_stride,
                            (num_tokens - token + kStep - 1) / kStep, dim - d, Order::by_token);
            }
            float* panel = to + (d / kPanel * pitch + t) / 2 * kPanel + d % kPanel;
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                for (int j = 0; j < 2; ++j) squares[j] = multiply_add(square[j][i], square[j][i], squares[j]);
                store(panel + i * kPanel, upper_halves((Bits)square[0][i], (Bits)square[1][i]));
            }
        }
    }
    const float sum = sum_of(squares[0] + squares[1]);
    return sum < __builtin_inff() ? sum : __builtin_inff();
}

}  // namespace ringspan::RINGSPAN_ISA
