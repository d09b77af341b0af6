#include "simd_avx2.h"
#define RINGSPAN_ISA avx2
#include "tile_kernel.h"
