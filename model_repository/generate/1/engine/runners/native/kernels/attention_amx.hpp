// Attention's two matmuls in AMX tiles, for up to 16 queries at a time:
//   scores[n][t] = sum over d of q[n][d] * k[t][d];   sums[n][d] += sum over t of weights[n][t] * v[t][d]
// Tokens are read 16 at a time, a tile; t counts whole tiles. Keys and values in int8 become bfloat16, which is exact, in the
// first-level cache; scores are multiplied by the keys' scales then, and weights hold those of the values.
//
// Layout: as in attention_simd.hpp, and the AMX layout of kv_layout.hpp.
// ISA variants: __AMX_BF16__ only. Tests: tests/inference/test_native.py, test_int8_kv.py (`all` with AMX, `amx_emulated`
// without). It knows no softmax.
#pragma once

#ifdef __AMX_BF16__
#include <algorithm>
#include <cstring>

#include "amx.hpp"
#include "kv_layout.hpp"

class AmxAttention {
  public:
    typedef bf16 Number;

    // `configured` is the number of queries for which this thread's tiles are configured; 0: for matmuls.
    AmxAttention(int head_dim, size_t score_stride, int& configured)
        : head_dim_(head_dim), score_stride_(score_stride), configured_(configured) {}

    void score(const bf16* queries, const float*, int count, const UpcomingKV<bf16>& kv, int from, int to, float* scores) {
        score_tiles(queries, count, kv.keys, from, to, scores, [&](int token) { kv.prefetch(token, head_dim_); });
    }

    // Calls `prefetch(token)` for each tile.
    template <typename Prefetch>
    void score_tiles(
        const bf16* queries, int count, const PagedTokens<bf16>& keys, int from, int to, float* scores, Prefetch prefetch
    ) {
        for_each_tile_of_queries(count, [&](int n) {
            const bf16* first = queries + (size_t)n * head_dim_;
            for (int token = from; token < to; token += kVecSize) {
                const bf16* key = keys.block(token) + token % keys.block_tokens * 2;
                if (count <= kTileRows) prefetch(token);
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

// The same with keys and values in int8, some tokens at a time.
class Int8AmxAttention {
  public:
    typedef bf16 Number;

    Int8AmxAttention(int head_dim, size_t score_stride, int& configured)
        : head_dim_(head_dim), score_stride_(score_stride), amx_(head_dim, score_stride, configured) {}

    void score(const bf16* queries, const float*, int count, const UpcomingKV<int8_t>& kv, int from, int to, float* scores) {
        for_each_run(from, to, [&](int begin, int end) {
            for (int token = begin; token < end; token += kVecSize) {
                const int8_t* from_key = kv.keys.block(token) + token % kv.keys.block_tokens * 2;
                bf16* const key = unpacked_ + (size_t)(token - begin) * head_dim_;
                if (count <= kTileRows) kv.prefetch(token, head_dim_);
                for (int k = 0; k < head_dim_; k += 2) unpack(from_key + (size_t)k * kv.keys.block_tokens, key + k * kVecSize);
            }
            float* const of_run = scores + begin - from;
            amx_.score_tiles(queries, count, run(), 0, end - begin, of_run, [](int) {});
            for (int token = begin; token < end; token += kVecSize)
                for (int n = 0; n < count; n++) {
                    float* const score = of_run + n * score_stride_ + token - begin;
                    store(score, load(score) * load(kv.keys.scales(token)));
                }
        });
    }

    void weigh(const bf16* weights, int count, const PagedTokens<int8_t>& values, int from, int to, float* sums) {
        for_each_run(from, to, [&](int begin, int end) {
            for (int token = begin; token < end; token += kVecSize) {
                const int8_t* from_value = values.block(token) + (size_t)(token % values.block_tokens) * head_dim_;
                bf16* const value = unpacked_ + (size_t)(token - begin) * head_dim_;
                for (int i = 0; i < kVecSize * head_dim_; i += 2 * kVecSize) unpack(from_value + i, value + i);
            }
            amx_.weigh(weights + begin - from, count, run(), 0, end - begin, sums);
        });
    }

  private:
    // Tokens that are unpacked together: with heads of 64, 8 KiB. kRunTokens / 16 blocks of 16 tokens.
    static constexpr int kRunTokens = 64, kMaxHeadDim = 256;

    template <typename Task>
    static void for_each_run(int from, int to, Task task) {
        for (int begin = from; begin < to; begin += kRunTokens) task(begin, std::min(begin + kRunTokens, to));
    }

    // 32 numbers.
    static void unpack(const int8_t* from, bf16* to) {
        const auto floats = [&](int i) {
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + i))));
        };
        const __m512bh numbers = _mm512_cvtne2ps_pbh(floats(kVecSize), floats(0));
        memcpy(to, &numbers, sizeof numbers);
    }

    PagedTokens<bf16> run() const {
        static constexpr int32_t kBlocks[kRunTokens / kVecSize] = {0, 1, 2, 3};
        return {unpacked_, kBlocks, (size_t)kVecSize * head_dim_, kVecSize, head_dim_};
    }

    const int head_dim_;
    const size_t score_stride_;
    AmxAttention amx_;
    alignas(kCacheLine) bf16 unpacked_[kRunTokens * kMaxHeadDim];
};
#endif
