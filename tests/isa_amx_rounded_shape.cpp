// What isa_amx_shape.cpp is to isa_amx.cpp, to isa_amx_rounded.cpp.
#define RINGSPAN_ISA amx_rounded_shape
#define RINGSPAN_LANES 16
#define RINGSPAN_VECTORS 2
#define RINGSPAN_ROWS 32
#define RINGSPAN_ROW_STEP 16
#define RINGSPAN_QUERIES_PER_ITEM 1024
#define RINGSPAN_PAIRS true
#define RINGSPAN_TILES "tiles_portable.h"
#define RINGSPAN_PRODUCTS "products_amx.h"
#define RINGSPAN_ROUNDS_WEIGHTS
#define RINGSPAN_REST baseline
#include "simd_portable.h"
#include "tile_kernel.h"
