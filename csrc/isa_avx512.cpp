#include "simd_avx512.h"
#define RINGSPAN_ISA avx512
#include "tile_kernel.h"
