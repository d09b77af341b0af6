#include "threads.h"

#include <stdlib.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "openmp.h"

namespace ringspan {
namespace {

constexpr size_t kAlignment = 64;

struct Scratch {
    void* memory = nullptr;
    size_t bytes = 0;

    ~Scratch() { free(memory); }

    // nullptr if there is no memory
    void* reserve(size_t wanted) {
        if (wanted <= bytes) return memory;
        free(memory);
        memory = aligned_alloc(kAlignment, (wanted + kAlignment - 1) / kAlignment * kAlignment);
        bytes = memory ? wanted : 0;
        return memory;
    }
};

thread_local Scratch scratch_of_thread;

// How a thread rounds, and what it makes of denormals (torch.set_flush_denormal): helpers compute as the caller does, or the
// bits would depend on who took which item.
class FloatMode {
#if defined(__SSE__)
public:
    static FloatMode of_this_thread() { return FloatMode{_mm_getcsr()}; }
    void set() const { _mm_setcsr((_mm_getcsr() & kRaised) | (bits_ & ~kRaised)); }

private:
    explicit FloatMode(unsigned bits) : bits_{bits} {}
    static constexpr unsigned kRaised = 0x3f;  // exceptions that have been
    unsigned bits_;
#else
public:
    static FloatMode of_this_thread() { return {}; }
    void set() const {}
#endif
};

struct Job {
    Work work;
    void* context;
    int64_t num_items;
    size_t scratch_bytes;
    FloatMode mode;
    std::atomic<int64_t> next_item{0};
    int helpers_wanted, helpers_at_work = 0;  // guarded by the pool's mutex

    // Takes items until there are none left; a thread that gets no memory leaves them to the others.
    void help() {
        void* scratch = scratch_of_thread.reserve(scratch_bytes);
        if (!scratch) return;
        const FloatMode own = FloatMode::of_this_thread();
        mode.set();
        for (int64_t i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < num_items;) work(context, i, scratch);
        own.set();
    }
};

class Pool {
public:
    void run(Job& job) {
        {
            std::lock_guard lock(mutex_);
            add_helpers(job.helpers_wanted);
            jobs_.push_back(&job);
        }
        job_came_.notify_all();
        job.help();
        std::unique_lock lock(mutex_);
        jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        helper_left_.wait(lock, [&] { return job.helpers_at_work == 0; });
    }

    int num_helpers() {
        std::lock_guard lock(mutex_);
        return num_helpers_;
    }

private:
    void add_helpers(int wanted) {
        try {
            for (; num_helpers_ < wanted; ++num_helpers_) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
            // The system has no more threads: those that there are do the work.
        }
    }

    Job* find_job() {
        for (Job* job : jobs_) {
            if (job->helpers_wanted > 0) return job;
        }
        return nullptr;
    }

    void help() {
        std::unique_lock lock(mutex_);
        for (;;) {
            Job* job = nullptr;
            job_came_.wait(lock, [&] { return (job = find_job()) != nullptr; });
            --job->helpers_wanted;
            ++job->helpers_at_work;
            lock.unlock();
            job->help();
            lock.lock();
            if (--job->helpers_at_work == 0) helper_left_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable job_came_, helper_left_;
    std::vector<Job*> jobs_;
    int num_helpers_ = 0;
};

// Never deleted: helpers may still sleep in it when the process ends.
std::atomic<Pool*> the_pool{nullptr};

// The child of a fork has no helpers, and the pool's mutex may be locked for ever: it starts with a new pool.
void forget_pool() { the_pool.store(nullptr); }

Pool& pool() {
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    static_cast<void>(registered);
#endif
    Pool* current = the_pool.load();
    if (current) return *current;
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
    return *current;
}

}  // namespace

void run_items(int num_threads, int64_t num_items, size_t scratch_bytes, Work work, void* context) {
    if (num_items <= 0) return;
    // Without scratch this thread could not do what no other does.
    if (!scratch_of_thread.reserve(scratch_bytes)) throw std::bad_alloc();
    const int threads = static_cast<int>(std::min<int64_t>(num_threads, num_items));
    Job job{work, context, num_items, scratch_bytes, FloatMode::of_this_thread(), {}, threads - 1};
    if (threads <= 1) return job.help();
    if (run_on_openmp(threads, [](void* pointer) { static_cast<Job*>(pointer)->help(); }, &job)) return;
    pool().run(job);
}

int default_threads() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int num_helpers() {
    Pool* current = the_pool.load();
    return current ? current->num_helpers() : 0;
}

}  // namespace ringspan
