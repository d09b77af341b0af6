// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace ringspan {

// Those that were compiled in and that this processor has, the fastest first.
std::vector<std::string> available_isas();

// The fastest available, or the one that the environment variable RINGSPAN_ISA names, decided by the first call.
// Throws std::invalid_argument if that one is unknown or not available.
const Kernels& kernels();

}  // namespace ringspan
