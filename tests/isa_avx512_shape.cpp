// The kernel in the shape that it has on AVX-512, for every processor: what depends on the number of lanes and rows is tested
// wherever the sanitizers run, and only the instructions of simd_avx512.h are not.
#define RINGSPAN_ISA avx512_shape
#define RINGSPAN_LANES 16
#define RINGSPAN_VECTORS 2
#define RINGSPAN_ROWS 14
#define RINGSPAN_ROW_STEP 2
#define RINGSPAN_QUERIES_PER_ITEM 1008
#define RINGSPAN_PAIRS true
#define RINGSPAN_ROUNDED avx512_rounded_shape
#include "simd_portable.h"
#include "tile_kernel.h"
