// A pool of helper threads for loops over work items.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace ringspan {

// Runs work(context, item, scratch) for the items 0 .. num_items on up to num_threads threads, this one included. Items are
// taken in ascending order. Scratch belongs to the thread, starts at a cache line and is kept for later calls. One thread locks
// nothing. The others are OpenMP's where the process has loaded it (openmp.h), else helpers of a pool, which sleep between calls
// and are never joined; a forked child makes its own.
using Work = void (*)(void* context, int64_t item, void* scratch);
void run_items(int num_threads, int64_t num_items, size_t scratch_bytes, Work work, void* context);

// The processors that this process may run on.
int default_threads();

// Helpers started so far.
int num_helpers();

}  // namespace ringspan
