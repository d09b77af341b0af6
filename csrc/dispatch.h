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

// Whether this processor has dot products of bfloat16 pairs (AVX512_BF16), which are exact products summed in float32 at up to
// twice the rate of float32's.
bool has_bfloat16_dots();

}  // namespace ringspan
