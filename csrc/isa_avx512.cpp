// 14 rows x 2 registers: 28 accumulators, 2 operands, 1 broadcast; 16 loads for 28 multiply-adds. One load for each, as with
// 28 rows x 1 register and broadcasts as memory operands, halves the rate of Intel's two units.
#define RINGSPAN_ISA avx512
#define RINGSPAN_ROWS 14
#define RINGSPAN_ROW_STEP 2  // ragged tiles run with 2, 4, .. 14 rows
#define RINGSPAN_QUERIES_PER_ITEM 1008
#define RINGSPAN_PAIRS false
#include "simd_avx512.h"
#include "tile_kernel.h"
