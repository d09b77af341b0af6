// AVX-512 with AMX's products of bfloat16, for calls of bfloat16.
#define RINGSPAN_ISA amx
#define RINGSPAN_ROWS 32
#define RINGSPAN_ROW_STEP 16
#define RINGSPAN_QUERIES_PER_ITEM 1024
#define RINGSPAN_PAIRS true
#define RINGSPAN_TILES "tiles_amx.h"
#define RINGSPAN_PRODUCTS "products_amx.h"
#define RINGSPAN_REST avx512
#define RINGSPAN_ROUNDED amx_rounded
#include "simd_avx512.h"
#include "tile_kernel.h"
