// Whatever the compiler targets by default: SSE2, NEON.
#define RINGSPAN_ISA baseline
#define RINGSPAN_LANES 4
#define RINGSPAN_VECTORS 2  // 6 rows x 2 registers of the 16 that SSE2 has
#define RINGSPAN_ROWS 6
#define RINGSPAN_ROW_STEP 2  // ragged tiles run with 2, 4, 6 rows
#define RINGSPAN_QUERIES_PER_ITEM 224
#define RINGSPAN_PAIRS false
#include "simd_portable.h"
#include "tile_kernel.h"
