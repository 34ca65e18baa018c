// AMX's tile registers: whether this process has them, and how they are shaped for products and for attention. Without
// them all of this is empty.
#pragma once

#include <cstdint>

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Activations are read in tiles of so many rows: their buffers are padded to them.
constexpr int kTileRows = 16;

#ifdef __AMX_BF16__
// The system gives a process these registers when it asks.
inline bool tiles_are_ours() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler does not see what tiles read: all that was written before lies in memory from here on.
inline void before_tiles() { asm volatile("" ::: "memory"); }

inline void shape_tiles(const TileShapes& shapes) {
    before_tiles();
    _tile_loadconfig(&shapes);
}

inline void begin_tiles() {
    if (tiles_are_ours()) shape_tiles(TileShapes());
}

// For so many queries: 0 and 1 gather results, or 1 holds queries; 2 holds weights of sixteen tokens, 3 keys and 4 values.
// No more than these few (see gemm.hpp).
inline void begin_attention_tiles(int queries) {
    TileShapes shapes;
    for (int tile = 0; tile < 3; tile++) shapes.rows[tile] = queries;
    shapes.bytes[2] = 32;
    shapes.rows[4] = 8;
    shape_tiles(shapes);
}

// What gathers results, in products and in attention.
inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
}

inline void end_tiles() {
    if (tiles_are_ours()) _tile_release();
}
#else
inline bool tiles_are_ours() { return false; }
inline void begin_tiles() {}
inline void end_tiles() {}
#endif
