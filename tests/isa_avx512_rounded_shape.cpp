// What isa_avx512_shape.cpp is to isa_avx512_bf16.cpp, to isa_avx512_rounded.cpp.
#define RINGSPAN_ISA avx512_rounded_shape
#define RINGSPAN_LANES 16
#define RINGSPAN_VECTORS 2
#define RINGSPAN_ROWS 14
#define RINGSPAN_ROW_STEP 2
#define RINGSPAN_QUERIES_PER_ITEM 1008
#define RINGSPAN_PAIRS true
#define RINGSPAN_PRODUCTS "products_rounded.h"
#define RINGSPAN_REST avx512_shape
#include "simd_portable.h"
#include "tile_kernel.h"
