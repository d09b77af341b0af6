// The same as isa_amx.cpp with weights of one bfloat16, for calls that allow it.
#define RINGSPAN_ISA amx_rounded
#define RINGSPAN_ROWS 32
#define RINGSPAN_ROW_STEP 16
#define RINGSPAN_QUERIES_PER_ITEM 1024
#define RINGSPAN_PAIRS true
#define RINGSPAN_TILES "tiles_amx.h"
#define RINGSPAN_PRODUCTS "products_amx.h"
#define RINGSPAN_ROUNDS_WEIGHTS
#define RINGSPAN_REST avx512
#include "simd_avx512.h"
#include "tile_kernel.h"
