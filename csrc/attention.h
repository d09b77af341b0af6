// One tile of exact attention on a CPU: what a call is made of, and its two entry points.
//
// A tile is B x H x T queries against B x K x S keys of D numbers each, with values of E.
// Query head h reads key/value head h / (H / K).
// Strides count elements, so that [.., s, d] and [.., d, s] storage, slices and broadcasts are all read in place.
#pragma once

#include <stdint.h>

namespace ringspan {

enum class DType { float32, bfloat16, float16 };

struct Sizes {
    int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;

    int64_t group() const { return heads / kv_heads; }
};

// A read-only [B, heads, tokens, D or E] array.
struct Input {
    const void* data;
    DType dtype;
    int64_t stride[4];
};

// A float32 [B, heads, tokens, D or E] array that is added to. Its last stride is 1.
struct Output {
    float* data;
    int64_t stride[4];

    float* row(int64_t b, int64_t h, int64_t t) const { return data + b * stride[0] + h * stride[1] + t * stride[2]; }
};

// A float32 [B, H, T] array: one number for each query row.
struct RowValues {
    float* data;
    int64_t stride[3];

    float& at(int64_t b, int64_t h, int64_t t) const { return data[b * stride[0] + h * stride[1] + t * stride[2]]; }
};

// Query row i sees the keys lo[i] <= j < hi[i]. Without arrays (lo == nullptr) that is the band i + lower <= j < i + upper.
// The caller keeps lower and upper within +-2^40, so that sums with a row number cannot overflow.
struct Mask {
    int64_t lower, upper;
    const int32_t* lo;
    const int32_t* hi;
    int64_t lo_stride[3], hi_stride[3];
};

// Keys and values that lie together, and who sees which of them.
struct KeyRun {
    Sizes sizes;  // of the queries against these keys
    Input k, v;
    Mask mask;
};

// Softmax state of a row: numerator acc * e^row_max, denominator row_sum * e^row_max; (0, -inf, 0) has seen nothing.
// The runs are absorbed in their order, with the bits of one call after the other. Their sizes differ in the number of keys alone.
struct AbsorbCall {
    Output acc;
    RowValues row_max, row_sum;
    Input q;
    float scale;
    const KeyRun* runs;
    int64_t num_runs;
    bool rounds_weights = false;  // to bfloat16: inputs must be, and the instruction set must offer it
    bool bfloat16_pairs = false;  // set by absorb where scores are dot products of bfloat16 pairs

    const Sizes& sizes() const { return runs[0].sizes; }
};

// p_ij = e^(s_ij - lse_i), ds_ij = p_ij (do_i . v_j - delta_i). dq.data == nullptr skips dq; dk.data == nullptr skips dk and dv.
struct GradientCall {
    Sizes sizes;
    Output dq, dk, dv;
    Input q, k, v, dout;
    RowValues lse, delta;
    float scale;
    Mask mask;
    bool rounds_weights = false;
    bool bfloat16_pairs = false;
};

// acc, row_max, row_sum += the runs. A row that sees no key is left as it is, bit for bit.
void absorb(const AbsorbCall& call, int num_threads);

// dq, dk, dv += the tile's gradients.
void absorb_gradient(const GradientCall& call, int num_threads);

}  // namespace ringspan
