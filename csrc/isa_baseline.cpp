#include "simd_baseline.h"
#define RINGSPAN_ISA baseline
#include "tile_kernel.h"
