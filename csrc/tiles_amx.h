// Intel AMX: eight tile registers of 16 rows x 64 bytes, and the product of two of them.
#pragma once

#include <stdint.h>

namespace ringspan::RINGSPAN_ISA {

// Tiles are usable while one of these lives on the thread. Afterwards the processor need not save them at a change of threads.
class TilesInUse {
    struct __attribute__((packed)) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };

public:
    TilesInUse() {
        const Configuration whole;
        __asm__ volatile("ldtilecfg %0" ::"m"(whole));
    }
    ~TilesInUse() { __asm__ volatile("tilerelease"); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

// The intrinsics would need the whole file compiled for AMX, and say nothing to the compiler of the memory that they touch.
// Rows are `pitch` floats apart.
template <int kTile>
RINGSPAN_INLINE void load_tile(const float* from, int64_t pitch) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(4 * pitch) : "memory");
}

template <int kTile>
RINGSPAN_INLINE void store_tile(float* to, int64_t pitch) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(4 * pitch) : "memory");
}

template <int kTile>
RINGSPAN_INLINE void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// out[m][n] += sum over k of the dot products of the bfloat16 pairs a[m][k] and b[k][n], in float32; denormals count as 0.
template <int kOut, int kA, int kB>
RINGSPAN_INLINE void multiply_tiles() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kOut), "i"(kA), "i"(kB));
}

}  // namespace ringspan::RINGSPAN_ISA
