// AVX-512 with dot products of bfloat16 pairs for scores and weights alike, for calls of bfloat16 that allow it.
#define RINGSPAN_ISA avx512_rounded
#define RINGSPAN_ROWS 14
#define RINGSPAN_ROW_STEP 2
#define RINGSPAN_QUERIES_PER_ITEM 1008
#define RINGSPAN_PAIRS true
#define RINGSPAN_PRODUCTS "products_rounded.h"
#define RINGSPAN_REST avx512_bf16
#include "simd_avx512.h"
#include "tile_kernel.h"
