#include "dispatch.h"

#include <stdlib.h>

#if defined(RINGSPAN_HAS_X86_KERNELS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>

namespace ringspan {

#ifdef RINGSPAN_HAS_X86_KERNELS
// AMX with bfloat16. Linux (5.16) gives a process the tile registers when it asks for them, for all its threads.
static bool get_amx() {
#ifdef __linux__
    constexpr unsigned kBfloat16 = 1 << 22, kTile = 1 << 24;  // leaf 7, edx
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool granted = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBfloat16) && (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
#else
    return false;
#endif
}
#endif

static std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found;
#ifdef RINGSPAN_HAS_X86_KERNELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        if (get_amx()) found.push_back(&amx::kernels);
        // AMD's processors do dot products of pairs as fast as multiply-adds (Zen 4); Intel's have not been seen to gain by them.
        const bool pairs = __builtin_cpu_supports("avx512bf16"), pairs_are_fast = __builtin_cpu_is("amd");
        if (pairs && pairs_are_fast) found.push_back(&avx512_bf16::kernels);
        found.push_back(&avx512::kernels);
        if (pairs && !pairs_are_fast) found.push_back(&avx512_bf16::kernels);
    }
    // Every processor with AVX2 has F16C.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#endif
    found.push_back(&baseline::kernels);
#ifdef RINGSPAN_HAS_TEST_SHAPES
    found.push_back(&avx512_shape::kernels);
    found.push_back(&amx_shape::kernels);
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
