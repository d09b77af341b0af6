// Runs the kernels of every instruction set over awkward shapes, for a build with sanitizers. Inputs end where their memory
// ends, so that a read past them is seen; results are compared with a float64 definition.
//
//     sanitize            all kernels, one thread and several
//     sanitize threads    the pool only: many calls from many threads at once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <thread>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "threads.h"

using namespace ringspan;

namespace {

int failures = 0;

struct Case {
    Sizes sizes;
    int64_t lower, upper;
    bool dims_first;  // [.., d, s] storage
    DType dtype;
    bool rounds_weights = false;
};

struct Problem {
    Case c;
    std::vector<float> q, k, v, dout;           // values, [B, heads, tokens, D]
    std::vector<uint16_t> q16, k16, v16, dout16;  // the same in bfloat16 or float16
    std::vector<float> acc, row_max, row_sum, lse, delta, dq, dk, dv;
};

int64_t rows(const Sizes& s) { return s.batch * s.heads * s.queries; }

Input view(const Case& c, const std::vector<float>& wide, const std::vector<uint16_t>& narrow, int64_t heads, int64_t tokens, int64_t dim) {
    const void* data = c.dtype == DType::float32 ? static_cast<const void*>(wide.data()) : narrow.data();
    if (c.dims_first) return {data, c.dtype, {heads * tokens * dim, tokens * dim, 1, tokens}};
    return {data, c.dtype, {heads * tokens * dim, tokens * dim, dim, 1}};
}

// Small multiples of 1/8 are exact in both 16 bit formats.
void fill(const Case& c, std::mt19937& random, std::vector<float>& wide, std::vector<uint16_t>& narrow, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float x = static_cast<float>(static_cast<int>(random() % 31) - 15) / 8;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        wide.push_back(x);
        const uint32_t magnitude = bits & 0x7fffffff;
        const uint32_t half = magnitude ? (bits >> 16 & 0x8000) | ((magnitude >> 13) - (112 << 10)) : 0;
        if (c.dtype != DType::float32) narrow.push_back(static_cast<uint16_t>(c.dtype == DType::bfloat16 ? bits >> 16 : half));
    }
}

float at(const Case& c, const std::vector<float>& x, int64_t heads, int64_t tokens, int64_t dim, int64_t b, int64_t h, int64_t t, int64_t d) {
    const int64_t head = (b * heads + h) * tokens * dim;
    return x[head + (c.dims_first ? d * tokens + t : t * dim + d)];
}

Mask mask_of(const Case& c) { return {c.lower, c.upper, nullptr, nullptr, {}, {}}; }

// The keys first .. last as a run of their own.
KeyRun run_of(const Problem& p, int64_t first, int64_t last) {
    const Case& c = p.c;
    const Sizes& s = c.sizes;
    KeyRun run{s, view(c, p.k, p.k16, s.kv_heads, s.keys, s.dim), view(c, p.v, p.v16, s.kv_heads, s.keys, s.value_dim), mask_of(c)};
    run.sizes.keys = last - first;
    run.mask.lower -= first;
    run.mask.upper -= first;
    for (Input* x : {&run.k, &run.v}) x->data = static_cast<const char*>(x->data) + first * x->stride[2] * (c.dtype == DType::float32 ? 4 : 2);
    return run;
}

void forward(Problem& p, int num_threads, int64_t num_runs = 1) {
    const Sizes& s = p.c.sizes;
    p.acc.assign(rows(s) * s.value_dim, 0);
    p.row_max.assign(rows(s), -INFINITY);
    p.row_sum.assign(rows(s), 0);
    const int64_t t = s.queries, ht = s.heads * t;
    std::vector<KeyRun> runs;
    for (int64_t i = 0; i < num_runs; ++i) runs.push_back(run_of(p, s.keys * i / num_runs, s.keys * (i + 1) / num_runs));
    absorb({{p.acc.data(), {ht * s.value_dim, t * s.value_dim, s.value_dim, 1}}, {p.row_max.data(), {ht, t, 1}}, {p.row_sum.data(), {ht, t, 1}},
            view(p.c, p.q, p.q16, s.heads, t, s.dim), 0.25f, runs.data(), num_runs, p.c.rounds_weights},
           num_threads);
}

void backward(Problem& p, int num_threads) {
    const Sizes& s = p.c.sizes;
    const int64_t t = s.queries, ht = s.heads * t, n = s.keys, kn = s.kv_heads * n, e = s.value_dim;
    p.dq.assign(rows(s) * s.dim, 0);
    p.dk.assign(s.batch * kn * s.dim, 0);
    p.dv.assign(s.batch * kn * e, 0);
    p.lse.resize(rows(s));
    p.delta.assign(rows(s), 0.5f);
    for (int64_t i = 0; i < rows(s); ++i) p.lse[i] = p.row_max[i] + logf(p.row_sum[i]);
    absorb_gradient({s, {p.dq.data(), {ht * s.dim, t * s.dim, s.dim, 1}}, {p.dk.data(), {kn * s.dim, n * s.dim, s.dim, 1}},
                     {p.dv.data(), {kn * e, n * e, e, 1}}, view(p.c, p.q, p.q16, s.heads, t, s.dim), view(p.c, p.k, p.k16, s.kv_heads, n, s.dim),
                     view(p.c, p.v, p.v16, s.kv_heads, n, e), view(p.c, p.dout, p.dout16, s.heads, t, e), {p.lse.data(), {ht, t, 1}},
                     {p.delta.data(), {ht, t, 1}}, 0.25f, mask_of(p.c), p.c.rounds_weights},
                    num_threads);
}

void expect(bool holds, const Case& c, const char* what) {
    if (holds) return;
    ++failures;
    printf("%s%s: T %ld S %ld D %ld E %ld heads %ld/%ld\n", what, c.rounds_weights ? ", weights rounded" : "", (long)c.sizes.queries, (long)c.sizes.keys, (long)c.sizes.dim, (long)c.sizes.value_dim, (long)c.sizes.heads, (long)c.sizes.kv_heads);
}

// Weights of 8 bits: gradients are sums that partly cancel.
bool near(const Case& c, const std::vector<float>& got, const std::vector<double>& expected) {
    double error = 0, size = 1e-30;
    for (size_t i = 0; i < got.size(); ++i) error += (got[i] - expected[i]) * (got[i] - expected[i]), size += expected[i] * expected[i];
    return sqrt(error / size) < (c.rounds_weights ? 1e-2 : 1e-5);
}

void compare(const Problem& p) {
    const Case& c = p.c;
    const Sizes& s = c.sizes;
    std::vector<double> out(p.acc.size()), dq(p.dq.size()), dk(p.dk.size()), dv(p.dv.size());
    std::vector<float> got = p.acc;
    for (int64_t row = 0; row < rows(s); ++row) {
        const int64_t i = row % s.queries, h = row / s.queries % s.heads, b = row / s.queries / s.heads, kv = h / s.group();
        double total = 0;
        for (int64_t j = std::max<int64_t>(0, i + c.lower); j < std::min(s.keys, i + c.upper); ++j) {
            double score = 0, dp = 0;
            const auto q = [&](int64_t d) { return at(c, p.q, s.heads, s.queries, s.dim, b, h, i, d); };
            const auto k = [&](int64_t d) { return at(c, p.k, s.kv_heads, s.keys, s.dim, b, kv, j, d); };
            const auto v = [&](int64_t d) { return at(c, p.v, s.kv_heads, s.keys, s.value_dim, b, kv, j, d); };
            const auto dout = [&](int64_t d) { return at(c, p.dout, s.heads, s.queries, s.value_dim, b, h, i, d); };
            for (int64_t d = 0; d < s.dim; ++d) score += 0.25 * q(d) * k(d);
            for (int64_t d = 0; d < s.value_dim; ++d) dp += static_cast<double>(dout(d)) * v(d);
            const double weight = exp(score), probability = exp(score - p.lse[row]), ds = probability * (dp - 0.5);
            total += weight;
            const int64_t key = (b * s.kv_heads + kv) * s.keys + j;
            for (int64_t d = 0; d < s.dim; ++d) {
                dq[row * s.dim + d] += 0.25 * ds * k(d);
                dk[key * s.dim + d] += 0.25 * ds * q(d);
            }
            for (int64_t d = 0; d < s.value_dim; ++d) {
                out[row * s.value_dim + d] += weight * v(d);
                dv[key * s.value_dim + d] += probability * dout(d);
            }
        }
        for (int64_t d = 0; d < s.value_dim; ++d) {
            out[row * s.value_dim + d] /= total > 0 ? total : 1;
            got[row * s.value_dim + d] /= p.row_sum[row] > 0 ? p.row_sum[row] : 1;
        }
    }
    expect(near(c, got, out), c, "forward");
    expect(near(c, p.dq, dq), c, "dq");
    expect(near(c, p.dk, dk), c, "dk");
    expect(near(c, p.dv, dv), c, "dv");
}

Problem problem_of(const Case& c, unsigned seed) {
    std::mt19937 random(seed);
    Problem p{c, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    const Sizes& s = c.sizes;
    fill(c, random, p.q, p.q16, rows(s) * s.dim);
    fill(c, random, p.dout, p.dout16, rows(s) * s.value_dim);
    fill(c, random, p.k, p.k16, s.batch * s.kv_heads * s.keys * s.dim);
    fill(c, random, p.v, p.v16, s.batch * s.kv_heads * s.keys * s.value_dim);
    for (auto* x : {&p.q, &p.k, &p.v, &p.dout}) x->shrink_to_fit();
    for (auto* x : {&p.q16, &p.k16, &p.v16, &p.dout16}) x->shrink_to_fit();
    return p;
}

void check(Problem& p, int64_t num_runs) {
    forward(p, 1, num_runs);
    backward(p, 1);
    compare(p);
    const Problem alone = p;
    forward(p, 4, num_runs);
    backward(p, 4);
    expect(p.acc == alone.acc && p.dq == alone.dq && p.dk == alone.dk && p.dv == alone.dv, p.c, "threads change bits");
}

void check_all_shapes() {
    const int64_t far = int64_t{1} << 40;
    const int64_t shapes[][4] = {{1, 1, 1, 1},      {29, 17, 3, 3},     {28, 128, 16, 16}, {65, 129, 33, 33}, {230, 260, 8, 8},  {57, 300, 64, 64},
                                 {100, 31, 130, 130}, {5, 7, 256, 256}, {300, 530, 34, 34}, {61, 140, 48, 32}, {61, 140, 17, 70}, {40, 270, 2, 129}};
    const int64_t bands[][2] = {{-far, far}, {-far, 1}, {-20, 3}, {40, far}, {-far, -60}, {5, 2}};
    unsigned seed = 0;
    for (const auto& shape : shapes) {
        for (const auto& band : bands) {
            for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
                const int64_t kv = 1 + seed % 2, group = 1 + seed / 2 % 3;
                Problem p = problem_of({{1 + seed % 2, kv * group, kv, shape[0], shape[1], shape[2], shape[3]}, band[0], band[1], seed % 3 == 0, dtype}, seed);
                const int64_t num_runs = 1 + seed % 4;
                ++seed;
                check(p, num_runs);
                if (dtype != DType::bfloat16 || !kernels().rounded) continue;
                p.c.rounds_weights = true;
                check(p, num_runs);
            }
        }
    }
}

void check_threads() {
    std::vector<std::thread> callers;
    for (unsigned n = 0; n < 4; ++n) {
        callers.emplace_back([n] {
            Problem p = problem_of({{1, 2, 1, 150, 500, 8, 8}, -1000, 1, false, n % 2 ? DType::bfloat16 : DType::float32}, n);
            p.c.rounds_weights = n == 1 && kernels().rounded;
            forward(p, 1);
            backward(p, 1);
            const Problem alone = p;
            for (int round = 0; round < 20; ++round) {
                forward(p, 2 + round % 3);
                backward(p, 2 + round % 3);
                expect(p.acc == alone.acc && p.dq == alone.dq && p.dk == alone.dk, p.c, "threads change bits");
            }
        });
    }
    for (auto& caller : callers) caller.join();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && strcmp(argv[1], "threads") == 0) {
        check_threads();
    } else {
        check_all_shapes();
        check_threads();
    }
    printf("%s: %d failures, %d helpers\n", kernels().name, failures, num_helpers());
    return failures != 0;
}
