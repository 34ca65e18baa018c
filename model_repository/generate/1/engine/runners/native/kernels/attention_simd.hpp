// Attention's two matmuls for a few queries and a run of tokens, in registers:
//   scores[n][t] = sum over d of q[n][d] * k[t][d];   sums[n][d] += sum over t of weights[n][t] * v[t][d]
// Each sum is accumulated in one order, of d or of t, whatever the number of queries.
//
// In int8, queries and weights are int16 (kv_int8.hpp): scores are multiplied by the scales of query and key, and sums are
// exact integers in int32, which the caller multiplies by the weights' scale.
//
// Layout: queries and sums are [query][head_dim], scores and weights [query][score_stride]; keys and values: kv_layout.hpp.
// ISA variants: pairs of bfloat16 are multiplied by vdpbf16ps with __AVX512BF16__ (queries and weights are rounded to
// bfloat16 then), and as float32 otherwise; pairs of int8: kv_int8.hpp. Tests: tests/inference/test_native.py,
// test_int8_kv.py. It knows no softmax.
#pragma once

#include <algorithm>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "kv_int8.hpp"
#include "kv_layout.hpp"
#include "simd.hpp"

// 16 sums: total[i] += by[0] * from[i], or with pairs by[0] * from[2 i] + by[1] * from[2 i + 1].
template <typename T, bool kPairs>
struct KVFma {
    typedef float Number, Sum;
    typedef Reg16 Sums;
    static constexpr int kInputs = 1;
    Reg16 numbers;
    explicit KVFma(const T* from) : numbers(load_regs(from)) {}
    void add(Reg16& total, const float* by) const { total += *by * numbers; }
};

template <>
struct KVFma<bf16, true> {
    typedef float Sum;
    typedef Reg16 Sums;
    static constexpr int kInputs = 2;
#ifdef __AVX512BF16__
    typedef bf16 Number;
    __m512i pairs;
    explicit KVFma(const bf16* from) : pairs(_mm512_loadu_si512(from)) {}
    void add(Reg16& total, const bf16* by) const {
        int32_t pair;
        memcpy(&pair, by, sizeof pair);
        total = (Reg16)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
    }
#else
    typedef float Number;
    Reg16 even, odd;
    explicit KVFma(const bf16* from) { split_pairs(from, even, odd); }
    void add(Reg16& total, const float* by) const {
        total += by[0] * even;
        total += by[1] * odd;
    }
#endif
};

template <>
struct KVFma<int8_t, true> : Int8Pairs {
    typedef int16_t Number;
    typedef int32_t Sum;
    typedef Reg16i Sums;
    static constexpr int kInputs = 2;
    using Int8Pairs::Int8Pairs;
};

template <typename T, bool kPairs>
class SimdAttention {
    typedef KVFma<T, kPairs> Fma;

  public:
    typedef typename Fma::Number Number;
    typedef typename Fma::Sum Sum;

    SimdAttention(int head_dim, size_t score_stride)
        : head_dim_(head_dim), score_stride_(score_stride), weight_stride_(score_stride * sizeof(float) / sizeof(Number)) {}

    // Tokens [from, to), and up to 15 more if `to` is not a multiple of 16. scores[0] is that of token `from`. `query_scales`
    // are those of int8.
    void score(
        const Number* queries, const float* query_scales, int count, const PagedTokens<T>& keys, const PagedTokens<T>&,
        int from, int to, float* scores
    ) const {
        for (int token = from; token < to;) {
            KeyVectors vectors;
            for (; vectors.count < kKeyVectors && token < to; vectors.count++) {
                const int end = keys.block_end(token, to), at = vectors.count;
                vectors.keys[at] = keys.block(token) + token % keys.block_tokens * Fma::kInputs;
                vectors.scores[at] = scores + token - from;
                if (kScaled) vectors.scales[at] = keys.scales(token);
                if (count <= kPassQueries) keys.prefetch_after(token, kPrefetchTokens);
                token = std::min(token + kVecSize, end);
            }
            for (int n = vectors.count; n < kKeyVectors; n++) {
                vectors.keys[n] = vectors.keys[n - 1];
                vectors.scores[n] = vectors.scores[n - 1];
                vectors.scales[n] = vectors.scales[n - 1];
            }
            for_each_pass(count, [&](auto pass, int n) {
                score_vectors<pass()>(queries + (size_t)n * head_dim_, query_scales + n, vectors, keys.block_tokens, n);
            });
        }
    }

    // Tokens [from, to), with pairs an even number of them. weights[0] is that of token `from`.
    void weigh(const Number* weights, int count, const PagedTokens<T>& values, int from, int to, Sum* sums) const {
        for (int begin = from, end; begin < to; begin = end) {
            end = std::min(begin + kCachedValues, to);
            for_each_pass(count, [&](auto pass, int n) {
                constexpr int kVecs = vectors_per_pass(pass());
                weigh_vectors<pass(), kVecs>(
                    weights + n * weight_stride_ + begin - from, values, begin, end, 0, sums + (size_t)n * head_dim_,
                    count <= kPassQueries
                );
            });
        }
    }

  private:
    static constexpr bool kScaled = KVLayout<T>::kScaled;
    // Keys that stay in the first-level cache while all queries pass: 64 of them, 16 KiB of float32 with head_dim 64. And
    // values: 32 KiB, so many because the sums are loaded and stored once for them.
    static constexpr int kKeyVectors = 4, kCachedValues = 128;
    // How far ahead keys and values are prefetched, where one pass over them does all queries.
    static constexpr int kPrefetchTokens = 128;
    // Queries of a pass, and accumulators beside which a pass's operands fit the registers.
    static constexpr int kPassQueries = 6, kPassAccumulators = kAccumulators == 4 ? 6 : 24;

    // Vectors of 16 keys, or of 16 numbers of a value, that a pass over some queries accumulates.
    static constexpr int vectors_per_pass(int queries) {
        return queries * 4 <= kPassAccumulators ? 4 : queries * 2 <= kPassAccumulators ? 2 : 1;
    }

    struct KeyVectors {
        int count = 0;
        const T* keys[kKeyVectors];
        float* scores[kKeyVectors];
        const float* scales[kKeyVectors] = {};
    };

    // Calls `task(queries as a constant, first query)` for passes of 6 queries and one of the rest.
    template <typename Task>
    static void for_each_pass(int count, Task task) {
        int n = 0;
        for (; n + kPassQueries <= count; n += kPassQueries) task(std::integral_constant<int, kPassQueries>(), n);
        rest_pass<kPassQueries - 1>(count - n, n, task);
    }

    template <int kQueries, typename Task>
    static void rest_pass(int count, int n, Task task) {
        if constexpr (kQueries > 0) {
            if (count == kQueries) return task(std::integral_constant<int, kQueries>(), n);
            rest_pass<kQueries - 1>(count, n, task);
        }
    }

    template <int kQueries>
    void score_vectors(
        const Number* queries, const float* query_scales, const KeyVectors& vectors, int block_tokens, int first
    ) const {
        constexpr int kVecs = vectors_per_pass(kQueries);
        for (int vec = 0; vec < vectors.count; vec += kVecs) {
            // The last vectors are repeated up to the end of the pass, unless one is left and a pass of one is fast.
            if (kVecs > 1 && kQueries > 3 && vec + 1 == vectors.count)
                score_pass<kQueries, 1>(queries, query_scales, vectors, vec, block_tokens, first);
            else score_pass<kQueries, kVecs>(queries, query_scales, vectors, vec, block_tokens, first);
        }
    }

    template <int kQueries, int kVecs>
    void score_pass(
        const Number* queries, const float* query_scales, const KeyVectors& vectors, int vec, int block_tokens, int first
    ) const {
        typename Fma::Sums sums[kQueries][kVecs] = {};
        const T* keys[kVecs];
        for (int i = 0; i < kVecs; i++) keys[i] = vectors.keys[vec + i];
        for (int k = 0; k < head_dim_; k += Fma::kInputs) {
            const size_t at = (size_t)k * block_tokens;
#pragma GCC unroll 4
            for (int i = 0; i < kVecs; i++) {
                const Fma step(keys[i] + at);
#pragma GCC unroll 6
                for (int n = 0; n < kQueries; n++) step.add(sums[n][i], queries + (size_t)n * head_dim_ + k);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; i++) {
            float* const scores = vectors.scores[vec + i] + first * score_stride_;
#pragma GCC unroll 6
            for (int n = 0; n < kQueries; n++) {
                float* const to = scores + n * score_stride_;
                if constexpr (kScaled) store(to, to_vec(sums[n][i]) * (query_scales[n] * load(vectors.scales[vec + i])));
                else store(to, sums[n][i]);
            }
        }
    }

    // All vectors of the head from vector `vec` on, kVecs at a time.
    template <int kQueries, int kVecs>
    void weigh_vectors(
        const Number* weights, const PagedTokens<T>& values, int from, int to, int vec, Sum* sums, bool prefetches
    ) const {
        for (; vec + kVecs <= head_dim_ / kVecSize; vec += kVecs)
            weigh_pass<kQueries, kVecs>(weights, values, from, to, vec, sums + vec * kVecSize, prefetches && vec == 0);
        if constexpr (kVecs > 1) weigh_vectors<kQueries, kVecs / 2>(weights, values, from, to, vec, sums, prefetches);
    }

    template <int kQueries, int kVecs>
    void weigh_pass(
        const Number* weights, const PagedTokens<T>& values, int from, int to, int vec, Sum* sums, bool prefetches
    ) const {
        typename Fma::Sums totals[kQueries][kVecs];
#pragma GCC unroll 6
        for (int n = 0; n < kQueries; n++)
#pragma GCC unroll 4
            for (int i = 0; i < kVecs; i++) totals[n][i] = load_regs(sums + (size_t)n * head_dim_ + i * kVecSize);
        for (int token = from, end; token < to; token = end) {
            end = values.block_end(token, to);
            if (prefetches) values.prefetch_after(token, kPrefetchTokens);
            const T* value = values.block(token) + (size_t)vec * kVecSize * Fma::kInputs;
            value += (size_t)(token % values.block_tokens) * head_dim_;
            const Number* weight = weights + token - from;
            for (int t = token; t < end; t += Fma::kInputs) {
#pragma GCC unroll 4
                for (int i = 0; i < kVecs; i++) {
                    const Fma step(value + i * kVecSize * Fma::kInputs);
#pragma GCC unroll 6
                    for (int n = 0; n < kQueries; n++) step.add(totals[n][i], weight + n * weight_stride_);
                }
                value += (size_t)head_dim_ * Fma::kInputs;
                weight += Fma::kInputs;
            }
        }
#pragma GCC unroll 6
        for (int n = 0; n < kQueries; n++)
#pragma GCC unroll 4
            for (int i = 0; i < kVecs; i++) store(sums + (size_t)n * head_dim_ + i * kVecSize, totals[n][i]);
    }

    const int head_dim_;
    const size_t score_stride_, weight_stride_;
};
