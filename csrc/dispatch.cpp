#include "dispatch.h"

#include <stdlib.h>

#include <stdexcept>

namespace ringspan {

static std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found;
#ifdef RINGSPAN_HAS_X86_KERNELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        found.push_back(&avx512::kernels);
    }
    // Every processor with AVX2 has F16C.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#endif
    found.push_back(&baseline::kernels);
#ifdef RINGSPAN_HAS_AVX512_SHAPE
    found.push_back(&avx512_shape::kernels);
#endif
    return found;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.push_back(k->name);
    return names;
}

static const Kernels& choose() {
    const char* wanted = getenv("RINGSPAN_ISA");
    const auto found = available();
    if (!wanted || !*wanted) return *found.front();
    std::string names;
    for (const Kernels* k : found) {
        if (wanted == std::string(k->name)) return *k;
        names += std::string(names.empty() ? "" : ", ") + k->name;
    }
    throw std::invalid_argument("RINGSPAN_ISA must name an instruction set that this processor and build have (" + names + "), got '" + wanted + "'");
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace ringspan
