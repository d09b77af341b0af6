// The OpenMP runtime that another library of this process has loaded, if there is one.
//
// The workers of GNU OpenMP keep spinning for some milliseconds after a parallel region, such as most of torch's operations
// are. Helper threads of one's own then fight for the same cores, and a call of 4 ms takes 7. Running on those workers instead
// costs nothing, and finds them awake.
#pragma once

namespace ringspan {

// Runs body(context) on up to num_threads threads, this one included, and waits for all. False: there is no such runtime,
// or this process is a fork (its workers are gone), and nothing has been run.
bool run_on_openmp(int num_threads, void (*body)(void*), void* context);

}  // namespace ringspan
