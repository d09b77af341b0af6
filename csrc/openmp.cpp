#include "openmp.h"

#if defined(__linux__)

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <string.h>

#include <atomic>
#include <string>

namespace ringspan {
namespace {

// GNU OpenMP's entry for "#pragma omp parallel", part of its stable binary interface.
using Parallel = void (*)(void (*body)(void*), void* context, unsigned num_threads, unsigned flags);

std::atomic<bool> is_fork{false};
// When this is loaded: the first call may come after the fork, and torch may have used its workers before it.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { is_fork = true; });

// Notes the path of a GNU OpenMP library, torch's own copy if there are several.
int note_path(dl_phdr_info* library, size_t, void* result) {
    auto& path = *static_cast<std::string*>(result);
    const char* slash = strrchr(library->dlpi_name, '/');
    if (strncmp(slash ? slash + 1 : library->dlpi_name, "libgomp", 7) != 0) return 0;
    if (path.empty() || strstr(library->dlpi_name, "torch")) path = library->dlpi_name;
    return 0;
}

Parallel find_parallel() {
    std::string path;
    dl_iterate_phdr(note_path, &path);
    void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return nullptr;
    return reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
}

// Looks until it has found one: torch may be imported later.
Parallel loaded_parallel() {
    static std::atomic<Parallel> found{nullptr};
    Parallel parallel = found.load(std::memory_order_acquire);
    if (parallel) return parallel;
    parallel = find_parallel();
    found.store(parallel, std::memory_order_release);
    return parallel;
}

}  // namespace

bool run_on_openmp(int num_threads, void (*body)(void*), void* context) {
    const Parallel parallel = loaded_parallel();
    if (!parallel || is_fork) return false;
    parallel(body, context, static_cast<unsigned>(num_threads), 0);
    return true;
}

}  // namespace ringspan

#else

namespace ringspan {

bool run_on_openmp(int, void (*)(void*), void*) { return false; }

}  // namespace ringspan

#endif
