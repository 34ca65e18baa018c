// AMX tile registers: permission, shapes for matmuls and for attention, and the two accumulators that both use.
//
// Layout: a tile is 16 rows of 64 bytes: 16 x 32 bfloat16, 16 x 64 int8, or 16 x 16 float32 or int32.
// ISA variants: __AMX_BF16__, and at run time the system's permission; otherwise amx_available() is false and the rest is
// empty. TRITONLM_AMX_EMULATION: tiles are those of tests/inference/amx_emulation.hpp. Tests: tests/inference/test_native.py
// and test_int8.py, with the variants `all` and `no_amx` on a processor with AMX, and `amx_emulated` on others.
#pragma once

#include <cstdint>

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Rows of a tile, to a multiple of which buffers of activation rows are padded; and bfloat16 numbers in a row.
constexpr int kTileRows = 16, kTileColumns = 32;

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TRITONLM_BYTE_TILES
#endif

#ifdef __AMX_BF16__
// Linux grants the registers' large state to a process that asks for it: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline bool amx_available() {
#ifdef TRITONLM_AMX_EMULATION
    return true;
#endif
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
}

// The operand of ldtilecfg: its 64 bytes in its order.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile instructions read memory without the compiler's knowledge: this makes it complete all earlier writes.
inline void compiler_fence() { asm volatile("" ::: "memory"); }

inline void configure_tiles(const TileConfig& config) {
    compiler_fence();
    _tile_loadconfig(&config);
}

inline void begin_matmul_tiles() {
    if (amx_available()) configure_tiles(TileConfig());
}

// Tiles of attention for `queries` queries: 0 and 1 accumulate, and 1 holds queries; 2 holds the weights of 16 tokens, 3
// keys, 4 values. It uses no more than these five (see gemm_amx.hpp).
inline void begin_attention_tiles(int queries) {
    TileConfig config;
    for (int tile = 0; tile < 3; tile++) config.rows[tile] = queries;
    config.bytes[2] = 32;
    config.rows[4] = 8;
    configure_tiles(config);
}

inline void zero_accumulators() {
    _tile_zero(0);
    _tile_zero(1);
}

inline void end_tiles() {
    if (amx_available()) _tile_release();
}
#else
inline bool amx_available() { return false; }
inline void begin_matmul_tiles() {}
inline void end_tiles() {}
#endif
