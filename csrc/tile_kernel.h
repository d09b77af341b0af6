// The kernel's one source body. A file csrc/isa_*.cpp includes a simd_*.h, names its namespace in RINGSPAN_ISA and includes this.
//
// Everything here has internal linkage or lives in that namespace, and no standard library template is used: the linker keeps
// one copy of an inline function for all files, and it may be the AVX-512 one.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "mask.h"
#include "arithmetic.h"
#include "pack.h"
#include "fetch.h"
#include "register_block.h"
#ifdef RINGSPAN_TILES
#include RINGSPAN_TILES
#endif
#ifdef RINGSPAN_PRODUCTS
#include RINGSPAN_PRODUCTS
#else
#include "products_fma.h"
#endif
#include "forward.h"
#include "backward.h"

namespace ringspan::RINGSPAN_ISA {

#define RINGSPAN_TEXT(x) #x
#define RINGSPAN_NAME(x) RINGSPAN_TEXT(x)

const Kernels kernels = {
    RINGSPAN_NAME(RINGSPAN_ISA),
    kHasPairs,
    kPairsOnly,
#ifdef RINGSPAN_REST
    &RINGSPAN_REST::kernels,
#else
    nullptr,
#endif
#ifdef RINGSPAN_ROUNDED
    &RINGSPAN_ROUNDED::kernels,
#else
    nullptr,
#endif
    kRows,
    kQueryTilesPerItem,
    kKeyTilesPerItem,
    kQueryBlock,
    absorb_scratch_bytes,
    absorb_item,
    gradient_scratch_bytes,
    absorb_gradient_item,
};

}  // namespace ringspan::RINGSPAN_ISA
