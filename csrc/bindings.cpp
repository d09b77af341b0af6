// The Python face: checks every argument by hand, so that an error names it, and computes without the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ringspan {
namespace {

using Array = nb::ndarray<nb::ro>;

constexpr int64_t kMaxDim = 256;
constexpr int64_t kMaxKeys = INT32_MAX - 1024;  // key numbers are int32, block ends included
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kFarAway = int64_t{1} << 40;  // a band's edge beyond all keys and queries

[[noreturn]] void refuse_type(const std::string& why) { throw nb::type_error(why.c_str()); }
[[noreturn]] void refuse_value(const std::string& why) { throw nb::value_error(why.c_str()); }

std::string name_of_type(nb::handle x) { return nb::cast<std::string>(nb::str(x.type().attr("__name__"))); }

std::string text_of(nb::dlpack::dtype t) {
    static const char* const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    return (t.code < 7 ? kinds[t.code] : "type") + std::to_string(t.bits);
}

std::string text_of(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

std::vector<int64_t> shape_of(const Array& x) {
    std::vector<int64_t> shape;
    for (size_t i = 0; i < x.ndim(); ++i) shape.push_back(static_cast<int64_t>(x.shape(i)));
    return shape;
}

Array array_of(const char* name, nb::handle object) {
    Array array;
    if (!nb::try_cast(object, array) || !array.is_valid()) {
        refuse_type(std::string(name) + " must be a CPU array that exports DLPack without a copy (give .detach() of a tensor that requires grad), got " +
                    name_of_type(object));
    }
    if (array.device_type() != nb::device::cpu::value) {
        refuse_value(std::string(name) + " must be in the memory of the CPU, got DLPack device type " + std::to_string(array.device_type()));
    }
    return array;
}

void require_dtype(const char* name, const Array& x, nb::dlpack::dtype wanted) {
    if (x.dtype() != wanted) refuse_type(std::string(name) + " must be " + text_of(wanted) + ", got " + text_of(x.dtype()));
}

void require_shape(const char* name, const char* axes, const Array& x, const std::vector<int64_t>& wanted) {
    if (shape_of(x) == wanted) return;
    refuse_value(std::string(name) + " must have shape " + axes + " = " + text_of(wanted) + ", got " + text_of(shape_of(x)));
}

void require_alignment(const char* name, const Array& x) {
    if (reinterpret_cast<uintptr_t>(x.data()) % (x.dtype().bits / 8) == 0) return;
    refuse_value(std::string(name) + " must start at a multiple of its element size");
}

// An axis of at most one element has no stride to speak of, whatever the array says.
int64_t stride_of(const Array& x, size_t axis) { return x.shape(axis) <= 1 ? 0 : x.stride(axis); }

void require_own_memory(const char* name, const Array& x) {
    for (size_t axis = 0; axis < x.ndim(); ++axis) {
        if (x.shape(axis) > 1 && x.stride(axis) == 0) {
            refuse_value(std::string(name) + " is written to and must not be an expanded view: its axis " + std::to_string(axis) + " has " +
                                   std::to_string(x.shape(axis)) + " elements and stride 0");
        }
    }
}

DType dtype_of(const char* name, const Array& x) {
    const nb::dlpack::dtype t = x.dtype();
    if (t == nb::dtype<float>()) return DType::float32;
    if (t.lanes == 1 && t.bits == 16 && t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) return DType::bfloat16;
    if (t.lanes == 1 && t.bits == 16 && t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) return DType::float16;
    refuse_type(std::string(name) + " must be float32, bfloat16 or float16, got " + text_of(t));
}

// The arguments' arrays stay alive here while the interpreter's lock is released.
struct Arguments {
    std::vector<Array> arrays;

    const Array& keep(Array array) {
        arrays.push_back(std::move(array));
        return arrays.back();
    }

    Input input(const char* name, const Array& x) {
        require_alignment(name, x);
        const int64_t dim_stride = x.shape(3) <= 1 ? 1 : x.stride(3);
        return {keep(x).data(), dtype_of(name, x), {stride_of(x, 0), stride_of(x, 1), stride_of(x, 2), dim_stride}};
    }

    Output output(const char* name, const char* axes, nb::handle object, const std::vector<int64_t>& shape) {
        const Array x = array_of(name, object);
        require_dtype(name, x, nb::dtype<float>());
        require_shape(name, axes, x, shape);
        require_alignment(name, x);
        require_own_memory(name, x);
        if (x.shape(3) > 1 && x.stride(3) != 1) {
            refuse_value(std::string(name) + " must have stride 1 on its last axis, got " + std::to_string(x.stride(3)));
        }
        return {static_cast<float*>(const_cast<void*>(keep(x).data())), {stride_of(x, 0), stride_of(x, 1), stride_of(x, 2), 1}};
    }

    RowValues row_values(const char* name, nb::handle object, const Sizes& sizes, bool written) {
        const Array x = array_of(name, object);
        require_dtype(name, x, nb::dtype<float>());
        require_shape(name, "[B, H, T]", x, {sizes.batch, sizes.heads, sizes.queries});
        require_alignment(name, x);
        if (written) require_own_memory(name, x);
        return {static_cast<float*>(const_cast<void*>(keep(x).data())), {stride_of(x, 0), stride_of(x, 1), stride_of(x, 2)}};
    }

    const int32_t* bounds(const char* name, nb::handle object, const Sizes& sizes, int64_t (&stride)[3]) {
        const Array x = array_of(name, object);
        require_dtype(name, x, nb::dtype<int32_t>());
        require_alignment(name, x);
        if (x.ndim() == 1) {
            require_shape(name, "[T]", x, {sizes.queries});
            stride[0] = stride[1] = 0;
            stride[2] = stride_of(x, 0);
        } else {
            const bool common = x.ndim() == 3 && x.shape(1) == 1;  // to all heads
            require_shape(name, "[T], [B, 1, T] or [B, H, T]", x, {sizes.batch, common ? 1 : sizes.heads, sizes.queries});
            for (int axis = 0; axis < 3; ++axis) stride[axis] = stride_of(x, axis);
        }
        return static_cast<const int32_t*>(keep(x).data());
    }
};

Array attention_input(const char* name, const char* axes, nb::handle object) {
    Array x = array_of(name, object);
    if (x.ndim() != 4) refuse_value(std::string(name) + " must have 4 axes " + axes + ", got " + text_of(shape_of(x)));
    dtype_of(name, x);
    return x;
}

Sizes sizes_of(const Array& q, const Array& k, const Array& v) {
    const auto qs = shape_of(q), ks = shape_of(k);
    const Sizes sizes{qs[0], qs[1], ks[1], qs[2], ks[2], qs[3], shape_of(v)[3]};
    const int64_t kv_heads = ks[1];
    require_shape("k", "[B, K, S, D]", k, {sizes.batch, kv_heads, sizes.keys, sizes.dim});
    require_shape("v", "[B, K, S, E]", v, {sizes.batch, kv_heads, sizes.keys, sizes.value_dim});
    if (kv_heads == 0 ? sizes.heads != 0 : sizes.heads % kv_heads != 0) {
        refuse_value("q must have a multiple of the heads of k: q has " + std::to_string(sizes.heads) + ", k has " + std::to_string(kv_heads));
    }
    if (sizes.dim > kMaxDim) refuse_value("q must have at most 256 numbers a token (D), got " + std::to_string(sizes.dim));
    if (sizes.value_dim > kMaxDim) refuse_value("v must have at most 256 numbers a token (E), got " + std::to_string(sizes.value_dim));
    if (sizes.keys > kMaxKeys) {
        refuse_value("k must have at most " + std::to_string(kMaxKeys) + " tokens (S), got " + std::to_string(sizes.keys));
    }
    return sizes;
}

void require_like_q(const char* name, const Array& x, const Array& q) {
    if (x.dtype() != q.dtype()) {
        refuse_type(std::string(name) + " must have the dtype of q, " + text_of(q.dtype()) + ", got " + text_of(x.dtype()));
    }
}

// An int; one too large for 64 bits becomes the largest.
int64_t integer_of(const char* name, nb::handle object) {
    const nb::object index = nb::steal(PyNumber_Index(object.ptr()));
    if (!index.is_valid()) {
        PyErr_Clear();
        refuse_type(std::string(name) + " must be an int, got " + name_of_type(object));
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    return overflow > 0 ? INT64_MAX : overflow < 0 ? INT64_MIN : value;
}

float scale_of(nb::handle object) {
    const double scale = PyFloat_AsDouble(object.ptr());
    if (PyErr_Occurred()) {
        PyErr_Clear();
        refuse_type("scale must be a number, got " + name_of_type(object));
    }
    // The kernel multiplies it by log2(e) in float32.
    if (!std::isfinite(static_cast<float>(scale * 1.5))) {
        refuse_value("scale must be finite in float32, got " + std::to_string(scale));
    }
    return static_cast<float>(scale);
}

int threads_of(nb::handle object) {
    const int64_t n = integer_of("num_threads", object);
    if (n < 0 || n > kMaxThreads) {
        refuse_value("num_threads must be 0 (all processors) or up to " + std::to_string(kMaxThreads) + ", got " + std::to_string(n));
    }
    return n == 0 ? default_threads() : static_cast<int>(n);
}

int64_t band_edge(const char* name, nb::handle object, int64_t unbounded) {
    return object.is_none() ? unbounded : std::min(std::max(integer_of(name, object), -kFarAway), kFarAway);
}

Mask mask_of(Arguments& arguments, const Sizes& sizes, nb::handle lower, nb::handle upper, nb::handle lo, nb::handle hi) {
    Mask mask{};
    mask.lower = band_edge("lower", lower, -kFarAway);
    mask.upper = band_edge("upper", upper, kFarAway);
    if (lo.is_none() != hi.is_none()) refuse_value("lo and hi must be given together");
    if (lo.is_none()) return mask;
    if (!lower.is_none() || !upper.is_none()) refuse_value("lo and hi cannot be combined with lower and upper");
    mask.lo = arguments.bounds("lo", lo, sizes, mask.lo_stride);
    mask.hi = arguments.bounds("hi", hi, sizes, mask.hi_stride);
    return mask;
}

KeyRun key_run(Arguments& arguments, const Array& qa, nb::handle k, nb::handle v, nb::handle lower, nb::handle upper, nb::handle lo, nb::handle hi) {
    const Array ka = attention_input("k", "[B, K, S, D]", k), va = attention_input("v", "[B, K, S, E]", v);
    KeyRun run{};
    run.sizes = sizes_of(qa, ka, va);
    require_like_q("k", ka, qa);
    require_like_q("v", va, qa);
    run.k = arguments.input("k", ka);
    run.v = arguments.input("v", va);
    run.mask = mask_of(arguments, run.sizes, lower, upper, lo, hi);
    return run;
}

// An item of `runs`: (k, v, lower, upper, lo, hi), the last four as in absorb.
KeyRun key_run(Arguments& arguments, const Array& qa, nb::handle object, size_t number) {
    nb::tuple parts;
    if (!nb::try_cast(object, parts) || parts.size() != 6) refuse_type("runs[" + std::to_string(number) + "] must be a tuple (k, v, lower, upper, lo, hi)");
    try {
        return key_run(arguments, qa, parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]);
    } catch (const nb::builtin_exception& error) {
        throw nb::builtin_exception(error.type(), ("runs[" + std::to_string(number) + "]: " + error.what()).c_str());
    }
}

bool rounding_of(nb::handle object, const Array& q) {
    if (!PyBool_Check(object.ptr())) refuse_type("rounds_weights must be a bool, got " + name_of_type(object));
    if (object.is(nb::bool_(false))) return false;
    if (dtype_of("q", q) != DType::bfloat16) refuse_type("rounds_weights rounds to bfloat16, which q must be, got " + text_of(q.dtype()));
    if (!kernels().rounded) refuse_value(std::string("rounds_weights is not offered by the instruction set in use, ") + kernels().name);
    return true;
}

// Everything but the keys and values.
AbsorbCall absorb_call(Arguments& arguments, const Array& qa, nb::handle acc, nb::handle row_max, nb::handle row_sum, nb::handle scale,
                       nb::handle rounds_weights, const std::vector<KeyRun>& runs) {
    AbsorbCall call{};
    const Sizes& s = runs[0].sizes;
    call.q = arguments.input("q", qa);
    call.acc = arguments.output("acc", "[B, H, T, E]", acc, {s.batch, s.heads, s.queries, s.value_dim});
    call.row_max = arguments.row_values("row_max", row_max, s, true);
    call.row_sum = arguments.row_values("row_sum", row_sum, s, true);
    call.scale = scale_of(scale);
    call.rounds_weights = rounding_of(rounds_weights, qa);
    call.runs = runs.data();
    call.num_runs = static_cast<int64_t>(runs.size());
    return call;
}

void py_absorb(nb::object acc, nb::object row_max, nb::object row_sum, nb::object q, nb::object k, nb::object v, nb::object scale,
               nb::object lower, nb::object upper, nb::object lo, nb::object hi, nb::object num_threads, nb::object rounds_weights) {
    Arguments arguments;
    const Array qa = attention_input("q", "[B, H, T, D]", q);
    const std::vector<KeyRun> runs{key_run(arguments, qa, k, v, lower, upper, lo, hi)};
    const AbsorbCall call = absorb_call(arguments, qa, acc, row_max, row_sum, scale, rounds_weights, runs);
    const int threads = threads_of(num_threads);
    nb::gil_scoped_release unlocked;
    absorb(call, threads);
}

void py_absorb_runs(nb::object acc, nb::object row_max, nb::object row_sum, nb::object q, nb::object runs, nb::object scale, nb::object num_threads,
                    nb::object rounds_weights) {
    Arguments arguments;
    const Array qa = attention_input("q", "[B, H, T, D]", q);
    nb::list items;
    if (!nb::try_cast(runs, items) || items.size() == 0) refuse_type("runs must be a list of at least one (k, v, lower, upper, lo, hi)");
    std::vector<KeyRun> found;
    for (size_t i = 0; i < items.size(); ++i) {
        found.push_back(key_run(arguments, qa, items[i], i));
        const Sizes &mine = found[i].sizes, &first = found[0].sizes;
        const auto refuse = [&](const char* what, int64_t wanted, int64_t got) {
            refuse_value("runs[" + std::to_string(i) + "]: " + what + " as in runs[0], " + std::to_string(wanted) + ", got " + std::to_string(got));
        };
        if (mine.kv_heads != first.kv_heads) refuse("k must have as many heads", first.kv_heads, mine.kv_heads);
        if (mine.value_dim != first.value_dim) refuse("v must have as many numbers a token (E)", first.value_dim, mine.value_dim);
    }
    const AbsorbCall call = absorb_call(arguments, qa, acc, row_max, row_sum, scale, rounds_weights, found);
    const int threads = threads_of(num_threads);
    nb::gil_scoped_release unlocked;
    absorb(call, threads);
}

void py_absorb_gradient(nb::object dq, nb::object dk, nb::object dv, nb::object q, nb::object k, nb::object v, nb::object dout,
                        nb::object lse, nb::object delta, nb::object scale, nb::object lower, nb::object upper, nb::object lo,
                        nb::object hi, nb::object num_threads, nb::object rounds_weights) {
    Arguments arguments;
    const Array qa = attention_input("q", "[B, H, T, D]", q);
    const Array ka = attention_input("k", "[B, K, S, D]", k), va = attention_input("v", "[B, K, S, E]", v);
    const Array da = attention_input("do", "[B, H, T, E]", dout);
    const Sizes s = sizes_of(qa, ka, va);
    require_shape("do", "[B, H, T, E]", da, {s.batch, s.heads, s.queries, s.value_dim});
    require_like_q("k", ka, qa);
    require_like_q("v", va, qa);
    require_like_q("do", da, qa);
    if (dk.is_none() != dv.is_none()) refuse_value("dk and dv must be given together, or both be None");
    GradientCall call{};
    call.sizes = s;
    call.q = arguments.input("q", qa);
    call.k = arguments.input("k", ka);
    call.v = arguments.input("v", va);
    call.dout = arguments.input("do", da);
    if (!dq.is_none()) call.dq = arguments.output("dq", "[B, H, T, D]", dq, {s.batch, s.heads, s.queries, s.dim});
    if (!dk.is_none()) {
        call.dk = arguments.output("dk", "[B, K, S, D]", dk, {s.batch, s.kv_heads, s.keys, s.dim});
        call.dv = arguments.output("dv", "[B, K, S, E]", dv, {s.batch, s.kv_heads, s.keys, s.value_dim});
    }
    call.lse = arguments.row_values("lse", lse, s, false);
    call.delta = arguments.row_values("delta", delta, s, false);
    call.scale = scale_of(scale);
    call.rounds_weights = rounding_of(rounds_weights, qa);
    call.mask = mask_of(arguments, s, lower, upper, lo, hi);
    const int threads = threads_of(num_threads);
    nb::gil_scoped_release unlocked;
    absorb_gradient(call, threads);
}

nb::dict info() {
    nb::list isas;
    for (const std::string& name : available_isas()) isas.append(name);
    nb::dict result;
    result["isas"] = isas;
    result["isa"] = kernels().name;
    result["rounds_weights"] = kernels().rounded != nullptr;
    result["default_threads"] = default_threads();
    result["helper_threads"] = num_helpers();
    return result;
}

}  // namespace
}  // namespace ringspan

// Every argument may be None here, so that the checks above can refuse it by name.
NB_MODULE(_native, m) {
    using namespace ringspan;
    m.doc() = "Attention on one tile, on a CPU. The shapes and the state's law are in ringspan.kernels.contract.";
    m.def("absorb", &py_absorb, "acc"_a.none(), "row_max"_a.none(), "row_sum"_a.none(), "q"_a.none(), "k"_a.none(), "v"_a.none(),
          nb::kw_only(), "scale"_a.none(), "lower"_a = nb::none(), "upper"_a = nb::none(), "lo"_a = nb::none(), "hi"_a = nb::none(),
          "num_threads"_a.none() = 0, "rounds_weights"_a.none() = false, "Absorb the keys and values into the softmax state (acc, row_max, row_sum), in place.");
    m.def("absorb_runs", &py_absorb_runs, "acc"_a.none(), "row_max"_a.none(), "row_sum"_a.none(), "q"_a.none(), "runs"_a.none(), nb::kw_only(),
          "scale"_a.none(), "num_threads"_a.none() = 0, "rounds_weights"_a.none() = false, "Absorb several runs of keys and values, [(k, v, lower, upper, lo, hi), ..], in their order.");
    m.def("absorb_gradient", &py_absorb_gradient, "dq"_a.none(), "dk"_a.none(), "dv"_a.none(), "q"_a.none(), "k"_a.none(),
          "v"_a.none(), "do"_a.none(), "lse"_a.none(), "delta"_a.none(), nb::kw_only(), "scale"_a.none(), "lower"_a = nb::none(),
          "upper"_a = nb::none(), "lo"_a = nb::none(), "hi"_a = nb::none(), "num_threads"_a.none() = 0,
          "rounds_weights"_a.none() = false, "Add the tile's gradients to dq, dk, dv. dq may be None, or dk and dv may be.");
    m.def("info", &info, "The instruction sets available, the one chosen, whether it can round weights, and the threads.");
}
