// AVX-512 with its dot products of bfloat16 pairs. The other dtypes take the same way as in isa_avx512.cpp.
// Compiled for AVX512_BF16 throughout: around an inline vdpbf16ps gcc 12 stored every accumulator in every round, and bfloat16
// ran at 0.62 of this rate (Zen 4).
#define RINGSPAN_ISA avx512_bf16
#define RINGSPAN_ROWS 14
#define RINGSPAN_ROW_STEP 2
#define RINGSPAN_QUERIES_PER_ITEM 1008
#define RINGSPAN_PAIRS true
#define RINGSPAN_ROUNDED avx512_rounded
#include "simd_avx512.h"
#include "tile_kernel.h"
