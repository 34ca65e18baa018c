// AMX tile instructions in plain C++, so that the code for AMX is tested on any processor with AVX2: included before the
// kernels (-include), this header defines the macros of AMX and replaces its intrinsics. Of tiles A (m x k), B (k x n):
//   dpbf16ps: c[m][n] += (sum over k of a[m][k][0] * b[k][n][0]) + (sum over k of a[m][k][1] * b[k][n][1]), as fused
//             multiply-adds in float32, where denormal operands and results are 0
//   dpbssd:   c[m][n] += sum over k and i < 4 of a[m][k][i] * b[k][n][i], in int32
//   dpbusd:   the same with unsigned a
//
// Layout: a tile is 16 rows of 64 bytes, of which an instruction uses as many as the configuration has. The others read as 0.
// ISA variants: AVX512F for the sums, or avx512_emulation.hpp before it. Used by: isa_variants.py (the
// variant `amx_emulated`). It knows no kernels.
#pragma once

#ifdef __AMX_TILE__
#error "This processor has AMX: its instructions need no emulation."
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbusd

namespace amx_emulation {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

struct Tile {
    alignas(64) uint8_t row[kRows][kRowBytes];
};

inline thread_local Config config;
inline thread_local Tile tiles[kTiles];

template <size_t kSize>
constexpr int digit(const char (&text)[kSize]) {
    static_assert(kSize == 2, "a tile's number is not a digit in the source");
    return text[0] - '0';
}

// What a processor answers with an exception.
inline void require(bool condition) {
    if (condition) return;
    fputs("amx_emulation: the configuration of the tiles forbids this instruction\n", stderr);
    abort();
}

inline void load_config(const void* from) {
    memcpy(&config, from, sizeof config);
    require(config.palette == 1);
    for (int tile = 0; tile < kTiles; tile++) require(config.rows[tile] <= kRows && config.bytes[tile] <= kRowBytes);
    memset(tiles, 0, sizeof tiles);
}

inline void release() { memset(&config, 0, sizeof config); }

inline void zero(int tile) {
    require(config.rows[tile]);
    tiles[tile] = {};
}

inline void load(int tile, const void* from, long stride) {
    zero(tile);
    for (int m = 0; m < config.rows[tile]; m++)
        memcpy(tiles[tile].row[m], static_cast<const char*>(from) + m * stride, config.bytes[tile]);
}

inline void store(int tile, void* to, long stride) {
    require(config.rows[tile]);
    for (int m = 0; m < config.rows[tile]; m++)
        memcpy(static_cast<char*>(to) + m * stride, tiles[tile].row[m], config.bytes[tile]);
}

// The rows of `to` and `a`, the rows of `b` and the columns of `to` and `b` are the same.
inline void require_shapes(int to, int a, int b) {
    require(config.rows[to] && config.rows[to] == config.rows[a] && config.bytes[a] == 4 * config.rows[b]);
    require(config.bytes[to] == config.bytes[b]);
}

typedef float Floats __attribute__((vector_size(kRowBytes)));
typedef uint32_t Bits __attribute__((vector_size(kRowBytes)));

template <typename Vector>
Vector load_vector(const void* from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Floats flush_denormals(Floats x) {
    constexpr uint32_t kSign = 1u << 31, kExponent = 0x7f800000;
    const Bits bits = (Bits)x;
    return (Floats)((bits & kExponent) == 0 ? bits & kSign : bits);
}

// Number i of each pair, as float32.
inline Floats of_pairs(Bits pairs, int i) { return flush_denormals((Floats)(i ? pairs & 0xffff0000 : pairs << 16)); }

inline void dpbf16ps(int to, int a, int b) {
    require_shapes(to, a, b);
    for (int m = 0; m < config.rows[to]; m++) {
        Floats sums[2] = {};
        for (int k = 0; k < config.rows[b]; k++) {
            uint32_t pair;
            memcpy(&pair, tiles[a].row[m] + 4 * k, sizeof pair);
            const Bits row = load_vector<Bits>(tiles[b].row[k]);
            for (int i = 0; i < 2; i++) {
                const Floats number = of_pairs(Bits{} + pair, i), column = of_pairs(row, i);
                sums[i] = flush_denormals((Floats)_mm512_fmadd_ps((__m512)number, (__m512)column, (__m512)sums[i]));
            }
        }
        const Floats before = flush_denormals(load_vector<Floats>(tiles[to].row[m]));
        const Floats sum = flush_denormals(before + flush_denormals(sums[0] + sums[1]));
        memcpy(tiles[to].row[m], &sum, config.bytes[to]);
    }
}

// `Byte` is that of a.
template <typename Byte>
void multiply_bytes(int to, int a, int b) {
    require_shapes(to, a, b);
    for (int m = 0; m < config.rows[to]; m++)
        for (int k = 0; k < config.rows[b]; k++)
            for (int n = 0; n < config.bytes[to] / 4; n++) {
                int32_t sum;
                memcpy(&sum, tiles[to].row[m] + 4 * n, sizeof sum);
                for (int i = 0; i < 4; i++)
                    sum += (Byte)tiles[a].row[m][4 * k + i] * (int8_t)tiles[b].row[k][4 * n + i];
                memcpy(tiles[to].row[m] + 4 * n, &sum, sizeof sum);
            }
}

inline void dpbssd(int to, int a, int b) { multiply_bytes<int8_t>(to, a, b); }
inline void dpbusd(int to, int a, int b) { multiply_bytes<uint8_t>(to, a, b); }

}  // namespace amx_emulation

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#define _tile_loadconfig amx_emulation::load_config
#define _tile_release amx_emulation::release
#define _tile_zero(tile) amx_emulation::zero(AMX_TILE(tile))
#define _tile_loadd(tile, from, stride) amx_emulation::load(AMX_TILE(tile), from, stride)
#define _tile_stored(tile, to, stride) amx_emulation::store(AMX_TILE(tile), to, stride)
#define _tile_dpbf16ps(to, a, b) amx_emulation::dpbf16ps(AMX_TILE(to), AMX_TILE(a), AMX_TILE(b))
#define _tile_dpbssd(to, a, b) amx_emulation::dpbssd(AMX_TILE(to), AMX_TILE(a), AMX_TILE(b))
#define _tile_dpbusd(to, a, b) amx_emulation::dpbusd(AMX_TILE(to), AMX_TILE(a), AMX_TILE(b))
// A tile's number must be a digit in the source: GCC's own macros write it into the instruction as it is there.
#define AMX_TILE(tile) amx_emulation::digit(#tile)
