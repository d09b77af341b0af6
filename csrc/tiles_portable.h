// The tile registers of tiles_amx.h in plain C++.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ringspan::RINGSPAN_ISA {

static thread_local float tiles[8][16][16];
static thread_local bool tiles_are_in_use = false;

struct TilesInUse {
    TilesInUse() { tiles_are_in_use = true; }
    ~TilesInUse() {
        tiles_are_in_use = false;
        memset(tiles, 0xff, sizeof tiles);  // NaN for who goes on using them
    }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

template <int kTile>
static void load_tile(const float* from, int64_t pitch) {
    if (!tiles_are_in_use) __builtin_trap();
    for (int i = 0; i < 16; ++i) memcpy(tiles[kTile][i], from + i * pitch, sizeof tiles[kTile][i]);
}

template <int kTile>
static void store_tile(float* to, int64_t pitch) {
    for (int i = 0; i < 16; ++i) memcpy(to + i * pitch, tiles[kTile][i], sizeof tiles[kTile][i]);
}

template <int kTile>
static void zero_tile() {
    memset(tiles[kTile], 0, sizeof tiles[kTile]);
}

template <int kOut, int kA, int kB>
static void multiply_tiles() {
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 16; n += kLanes) store(tiles[kOut][m] + n, dot_pairs_broadcast(&tiles[kA][m][k], load(tiles[kB][k] + n), load(tiles[kOut][m] + n)));
        }
    }
}

}  // namespace ringspan::RINGSPAN_ISA
