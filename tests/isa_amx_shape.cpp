// The kernel in the shape that it has on AMX, for every processor, as isa_avx512_shape.cpp does for AVX-512: only the
// instructions of tiles_amx.h and simd_avx512.h are not tested with it.
#define RINGSPAN_ISA amx_shape
#define RINGSPAN_LANES 16
#define RINGSPAN_VECTORS 2
#define RINGSPAN_ROWS 32
#define RINGSPAN_ROW_STEP 16
#define RINGSPAN_QUERIES_PER_ITEM 1024
#define RINGSPAN_PAIRS true
#define RINGSPAN_TILES "tiles_portable.h"
#define RINGSPAN_PRODUCTS "products_amx.h"
#define RINGSPAN_REST baseline
#define RINGSPAN_ROUNDED amx_rounded_shape
#include "simd_portable.h"
#include "tile_kernel.h"
