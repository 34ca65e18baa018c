// Attention's two matmuls in AMX tiles, for up to 16 queries at a time:
//   scores[n][t] = sum over d of q[n][d] * k[t][d];   sums[n][d] += sum over t of weights[n][t] * v[t][d]
// Tokens are read 16 at a time, a tile; t counts whole tiles.
//
// Layout: as in attention_simd.hpp, and the AMX layout of kv_layout.hpp.
// ISA variants: __AMX_BF16__ only. Test: tests/inference/test_native.py (`all` with AMX, `amx_emulated` without). It knows no
// softmax.
#pragma once

#ifdef __AMX_BF16__
#include <algorithm>

#include "amx.hpp"
#include "kv_layout.hpp"

class AmxAttention {
  public:
    // `configured` is the number of queries for which this thread's tiles are configured; 0: for matmuls.
    AmxAttention(int head_dim, size_t score_stride, int& configured)
        : head_dim_(head_dim), score_stride_(score_stride), configured_(configured) {}

    void score(const bf16* queries, const float*, int count, const UpcomingKV<bf16>& kv, int from, int to, float* scores) {
        const PagedTokens<bf16>& keys = kv.keys;
        for_each_tile_of_queries(count, [&](int n) {
            const bf16* first = queries + (size_t)n * head_dim_;
            for (int token = from; token < to; token += kVecSize) {
                const bf16* key = keys.block(token) + token % keys.block_tokens * 2;
                if (count <= kTileRows) kv.prefetch(token, head_dim_);
                _tile_zero(0);
                for (int k = 0; k < head_dim_; k += kTileColumns) {
                    _tile_loadd(1, first + k, head_dim_ * sizeof(bf16));
                    _tile_loadd(3, key + (size_t)k * keys.block_tokens, keys.block_tokens * 2 * sizeof(bf16));
                    _tile_dpbf16ps(0, 1, 3);
                }
                _tile_stored(0, scores + n * score_stride_ + token - from, score_stride_ * sizeof(float));
            }
        });
    }

    void weigh(const bf16* weights, int count, const PagedTokens<bf16>& values, int from, int to, float* sums) {
        const size_t weight_bytes = score_stride_ * sizeof(float), value_bytes = 2 * head_dim_ * sizeof(bf16);
        const size_t sum_bytes = head_dim_ * sizeof(float);
        for_each_tile_of_queries(count, [&](int n) {
            const char* weight = (const char*)weights + n * weight_bytes;
            for (int dim = 0; dim < head_dim_; dim += 2 * kVecSize) {
                float* to_sums = sums + (size_t)n * head_dim_ + dim;
                _tile_loadd(0, to_sums, sum_bytes);
                _tile_loadd(1, to_sums + kVecSize, sum_bytes);
                for (int token = from; token < to; token += kVecSize) {
                    const bf16* value = values.block(token) + (size_t)(token % values.block_tokens) * head_dim_ + 2 * dim;
                    _tile_loadd(2, weight + (token - from) * sizeof(bf16), weight_bytes);
                    _tile_loadd(4, value, value_bytes);
                    _tile_dpbf16ps(0, 2, 4);
                    _tile_loadd(4, value + 2 * kVecSize, value_bytes);
                    _tile_dpbf16ps(1, 2, 4);
                }
                _tile_stored(0, to_sums, sum_bytes);
                _tile_stored(1, to_sums + kVecSize, sum_bytes);
            }
        });
    }

  private:
    // Calls `task(first query)` with the tiles configured for its queries.
    template <typename Task>
    void for_each_tile_of_queries(int count, Task task) {
        compiler_fence();
        for (int n = 0; n < count; n += kTileRows) {
            const int queries = std::min(count - n, kTileRows);
            if (configured_ != queries) begin_attention_tiles(queries);
            configured_ = queries;
            task(n);
        }
        compiler_fence();
    }

    const int head_dim_;
    const size_t score_stride_;
    int& configured_;
};
#endif
