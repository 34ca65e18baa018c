// Causal attention over the paged KV cache, GQA included. For row r at position p and query head h with KV head h / g:
//   s[t] = q[r][h] . k[t] / sqrt(head_dim),  t = 0..p;  y[r][h] = sum over t of exp(s[t] - max s) * v[t] / sum of exp
// g = heads_per_kv. A row is summed in one order, whichever rows share its group: its result is the same bits.
//
// Layout: queries and y are [row][head][head_dim]; keys and values: kv_layout.hpp.
// ISA variants: __AMX_BF16__ (and KVLayout's conditions at run time) multiplies tiles; otherwise Reg16, with the head's width
// known to the compiler. Test: tests/inference/test_native.py. It knows no layers or weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "amx.hpp"
#include "kv_layout.hpp"
#include "rows.hpp"
#include "shared_prefix.hpp"
#include "simd.hpp"
#include "step.hpp"
#include "thread_pool.hpp"

template <typename T>
class Attention : public KVLayout<T> {
  public:
    Attention(int num_heads, int heads_per_kv, int head_dim) : KVLayout<T>(num_heads, heads_per_kv, head_dim) {}

    // Before the layers: where each row's key and value go, and which rows are attended together.
    void begin(const Step& step, int threads) {
        KVLayout<T>::begin(step);
        scratch_.resize(threads);
        // At most 16 queries, a tile's rows, and at least two work items for each thread.
        const int queries = std::clamp(step.rows * num_heads_ / (2 * threads), 1, kTileRows);
        const int max_sequences = amx_ ? std::max(1, queries / heads_per_kv_) : queries;
        groups_.build(step, amx_ ? kTileRows / heads_per_kv_ : kChunkRows, max_sequences);
    }

    // This thread's share of all rows and heads.
    void attend(const T* keys, const T* values, const float* queries, Rows<T>& output, WorkQueue& queue, int thread) {
        dispatch_head_dim<1>([&](auto vecs) {
            Scratch& scratch = scratch_[thread];
            scratch.tile_queries = 0;
            // With AMX an item is all query heads of a KV head.
            const int heads_per_item = amx_ ? heads_per_kv_ : 1, items_per_group = num_heads_ / heads_per_item;
            queue.for_each_redundant(groups_.size() * items_per_group, [&](int i, Claim& claim) {
                const RowGroup& group = groups_[i / items_per_group];
                const int* rows = groups_.rows(group);
                const Item item{i % items_per_group * heads_per_item, keys, values, queries, &output, &claim};
#ifdef __AMX_BF16__
                if constexpr (sizeof(T) == sizeof(bf16))
                    if (amx_) return amx_attend<vecs()>(item, group, rows, scratch);
#endif
                if (group.one_sequence && group.count == kChunkRows)
                    return attend_rows<vecs(), kChunkRows>(item, rows[0], scratch);
                // One after the other: the blocks that they share stay in the cache.
                for (int n = 0; n < group.count; n++) attend_rows<vecs(), 1>(item, rows[n], scratch);
            });
            if (scratch.tile_queries) begin_matmul_tiles();
        });
    }

    // Vectors of the widest head: head_dim 128.
    static constexpr int kMaxVecs = 8;

  private:
    using KVLayout<T>::amx_, KVLayout<T>::block_size_, KVLayout<T>::block_table, KVLayout<T>::block_tokens_;
    using KVLayout<T>::head_dim_, KVLayout<T>::head_offset, KVLayout<T>::heads_per_kv_, KVLayout<T>::num_heads_;
    using KVLayout<T>::step_;

    struct Item {
        int head;
        const T *keys, *values;
        const float* queries;
        Rows<T>* output;
        Claim* claim;
    };

    struct Scratch {
        AlignedVector<float> scores;
        AlignedVector<bf16> weights;
        // The number of queries that the tiles are configured for; 0: for matmuls.
        int tile_queries = 0;
    };

    // Calls `task` with head_dim / 16 as a constant.
    template <int kVecs, typename Task>
    void dispatch_head_dim(Task task) {
        if constexpr (kVecs < kMaxVecs)
            if (head_dim_ != kVecs * kVecSize) return dispatch_head_dim<kVecs + 1>(task);
        task(std::integral_constant<int, kVecs>());
    }

    // Rows row to row + kRows - 1 of one sequence, one head. `shortest` and `longest` are the tokens that the first and the
    // last row attend to.
    template <int kVecs, int kRows>
    void attend_rows(const Item& item, int row, Scratch& scratch) {
        const int shortest = step_->positions[row] + 1, longest = shortest + kRows - 1;
        // Room for a vector beyond the end: see softmax.
        const size_t query_stride = (size_t)num_heads_ * head_dim_;
        const size_t score_stride = (longest + 2 * kVecSize) / kVecSize * kVecSize;
        if (scratch.scores.size() < kRows * score_stride) scratch.scores.resize(2 * kRows * score_stride);
        float* const scores = scratch.scores.data();
        const float scale = 1.0f / std::sqrt((float)head_dim_);
        const float* query = item.queries + row * query_stride + item.head * head_dim_;
        const int32_t* const table = block_table(row);
        for (int first = 0; first < longest; first += block_tokens_) {
            const T* block = item.keys + table[first / block_tokens_] * block_size_ + head_offset(item.head);
            for (int token = 0; token < std::min(block_tokens_, longest - first); token += kVecSize) {
                // Four partial sums for each row: an addition does not wait for the one before.
                Reg16 partial[kRows][4];
                constexpr int kCount = std::min(kAccumulatorsPerRow<kRows>, 4);
                for (int i = 0; i < 4; i += kCount)
                    score_partial<kVecs, kRows, kCount>(
                        query + i, query_stride, block + token + (size_t)i * block_tokens_, &partial[0][i]
                    );
                for (int n = 0; n < kRows; n++)
                    store(
                        scores + n * score_stride + first + token,
                        (partial[n][0] + partial[n][1]) + (partial[n][2] + partial[n][3])
                    );
            }
        }
        float denominators[kRows];
        for (int n = 0; n < kRows; n++)
            denominators[n] = softmax(scores + n * score_stride, shortest + n, scale, scores + n * score_stride);
        weigh_values<kVecs, kRows, 0>(item, row, scores, score_stride, denominators);
    }

    template <int kRows>
    static constexpr int kAccumulatorsPerRow = std::max(kAccumulators / kRows, 1);

    // partial[n][i] = sum over d = 0, 4, 8, … of q[n][d + i] * k[16 tokens][d + i], for i in [0, kCount).
    template <int kVecs, int kRows, int kCount>
    void score_partial(const float* query, size_t query_stride, const T* key, Reg16* partial) const {
        Reg16 sums[kRows][kCount] = {};
        for (int k = 0; k < kVecs * kVecSize; k += 4)
#pragma GCC unroll 4
            for (int i = 0; i < kCount; i++) {
                const Reg16 keys = load_regs(key + (size_t)(k + i) * block_tokens_);
#pragma GCC unroll 4
                for (int n = 0; n < kRows; n++) sums[n][i] += query[n * query_stride + k + i] * keys;
            }
        for (int n = 0; n < kRows; n++)
            for (int i = 0; i < kCount; i++) partial[n * 4 + i] = sums[n][i];
    }

    // y = sum over tokens of weight * value: as many vectors of the head as fit the registers for all tokens, from vector
    // kFirst on, and then the next ones.
    template <int kVecs, int kRows, int kFirst>
    void weigh_values(const Item& item, int row, const float* weights, size_t score_stride, const float* denominators) const {
        constexpr int kCount = std::min(kVecs - kFirst, kAccumulatorsPerRow<kRows>);
        const int shortest = step_->positions[row] + 1, longest = shortest + kRows - 1;
        const int32_t* const table = block_table(row);
        Reg16 total[kRows][kCount] = {};
        for (int first = 0; first < longest; first += block_tokens_) {
            const T* block =
                item.values + table[first / block_tokens_] * block_size_ + head_offset(item.head) + kFirst * kVecSize;
            const int count = std::min(block_tokens_, longest - first), common = std::min(block_tokens_, shortest - first);
            const auto add = [&](int token, int first_row) {
#pragma GCC unroll 8
                for (int vec = 0; vec < kCount; vec++) {
                    const Reg16 values = load_regs(block + (size_t)token * kVecs * kVecSize + vec * kVecSize);
#pragma GCC unroll 4
                    for (int n = 0; n < kRows; n++)
                        if (n >= first_row) total[n][vec] += weights[n * score_stride + first + token] * values;
                }
            };
            for (int token = 0; token < common; token++) add(token, 0);
            // Tokens that only the later rows attend to.
            for (int token = std::max(common, 0); token < count; token++) add(token, first + token + 1 - shortest);
        }
        for (int n = 0; n < kRows && item.claim->acquire(); n++)
            for (int vec = 0; vec < kCount; vec++) {
                const Vec16 sums = total[n][vec];
                store(item.output->at(row + n, item.head * head_dim_ + (kFirst + vec) * kVecSize), sums / denominators[n]);
            }
        if constexpr (kFirst + kCount < kVecs)
            weigh_values<kVecs, kRows, kFirst + kCount>(item, row, weights, score_stride, denominators);
    }

#ifdef __AMX_BF16__
    // Up to 16 queries, query n of row rows[n / g] and head item.head + n % g: all of them over the blocks that the rows
    // share, then each row's queries over its own blocks. Tokens are read 16 at a time, a tile. A query's tokens beyond its
    // end weigh 0, which changes no sum.
    template <int kVecs>
    void amx_attend(const Item& item, const RowGroup& group, const int* rows, Scratch& scratch) {
        const int count = group.count * heads_per_kv_;
        int tiles[kTileRows], longest = 0;
        for (int n = 0; n < count; n++)
            longest = std::max(longest, tiles[n] = step_->positions[rows[n / heads_per_kv_]] / kVecSize + 1);
        const int common = group.one_sequence ? longest : group.shared_blocks * (block_tokens_ / kVecSize);
        const size_t score_stride = (size_t)(longest + 1) * kVecSize;
        if (scratch.scores.size() < kTileRows * score_stride) {
            scratch.scores.resize(2 * kTileRows * score_stride);
            scratch.weights.resize(2 * kTileRows * score_stride);
        }
        // `task(first query, queries, first tile, last tile + 1)`
        const auto for_each_range = [&](auto task) {
            task(0, count, 0, common);
            for (int n = 0; n < count && !group.one_sequence; n += heads_per_kv_) task(n, heads_per_kv_, common, tiles[n]);
        };
        for_each_range([&](int n, int queries, int from, int to) {
            configure(scratch, queries);
            amx_scores<kVecs>(item, rows, n, queries, from, to, scratch.scores.data() + n * score_stride, score_stride);
        });
        float denominators[kTileRows];
        for (int n = 0; n < count; n++) {
            bf16* weights = scratch.weights.data() + n * score_stride;
            const float scale = 1.0f / std::sqrt((float)head_dim_);
            const int length = step_->positions[rows[n / heads_per_kv_]] + 1;
            denominators[n] = softmax(scratch.scores.data() + n * score_stride, length, scale, weights);
            for (int tile = tiles[n]; tile < common; tile++) store(weights + tile * kVecSize, Vec16{});
        }
        for (int vec = 0; vec < kVecs; vec += kAmxVecs) {
            alignas(64) float sums[kAmxVecs][kTileRows][kVecSize];
            for_each_range([&](int n, int queries, int from, int to) {
                configure(scratch, queries);
                const bf16* weights = scratch.weights.data() + n * score_stride;
                amx_weigh_values<std::min(kVecs, kAmxVecs)>(
                    item, rows[n / heads_per_kv_], vec, from, to, weights, score_stride, &sums[0][n]
                );
            });
            for (int n = 0; n < count && item.claim->acquire(); n++) {
                const int row = rows[n / heads_per_kv_], column = (item.head + n % heads_per_kv_) * head_dim_;
                for (int i = 0; i < std::min(kVecs - vec, kAmxVecs); i++)
                    store(item.output->at(row, column + (vec + i) * kVecSize), load(sums[i][n]) / denominators[n]);
            }
        }
    }

    static void configure(Scratch& scratch, int queries) {
        if (scratch.tile_queries != queries) begin_attention_tiles(queries);
        scratch.tile_queries = queries;
    }

    // Offset of query n of an item.
    size_t query_offset(const Item& item, const int* rows, int n) const {
        return ((size_t)rows[n / heads_per_kv_] * num_heads_ + item.head + n % heads_per_kv_) * head_dim_;
    }

    // The keys, or values, of 16 tokens of a head; `token_stride` is the offset from one token to the next.
    const T* tile_of(const T* cache, int head, int row, int tile, size_t token_stride) const {
        const int token = tile * kVecSize;
        return cache + block_table(row)[token / block_tokens_] * block_size_ + head_offset(head) +
            token % block_tokens_ * token_stride;
    }

    template <int kVecs>
    void amx_scores(
        const Item& item, const int* rows, int first, int count, int from, int to, float* scores, size_t score_stride
    ) const {
        alignas(64) bf16 queries[kTileRows][kVecs * kVecSize];
        for (int n = 0; n < count; n++)
            for (int k = 0; k < head_dim_; k += kVecSize)
                store(&queries[n][k], load(item.queries + query_offset(item, rows, first + n) + k));
        compiler_fence();
        const int row = rows[first / heads_per_kv_];
        for (int tile = from; tile < to; tile++) {
            const T* keys = tile_of(item.keys, item.head, row, tile, 2);
            // The values are read next, and after them the next head's keys (amx_weigh_values).
            prefetch(tile_of(item.values, item.head, row, tile, head_dim_));
            _tile_zero(0);
            for (int k = 0; k < kVecs * kVecSize; k += 2 * kVecSize) {
                _tile_loadd(1, &queries[0][k], kVecs * kVecSize * sizeof(bf16));
                _tile_loadd(3, keys + (size_t)k * block_tokens_, block_tokens_ * 2 * sizeof(bf16));
                _tile_dpbf16ps(0, 1, 3);
            }
            _tile_stored(0, scores + tile * kVecSize, score_stride * sizeof(float));
        }
    }

    // Prefetches 16 tokens into the second-level cache: all of them if a block holds 16 tokens, the default; with other
    // sizes it is a hint without effect on the result.
    void prefetch(const T* from) const {
        for (int i = 0; i < head_dim_ * kVecSize; i += kCacheLine / sizeof(T))
            _mm_prefetch((const char*)(from + i), _MM_HINT_T1);
    }

    // sums[i][n] += weights[n] * values, for kCount vectors of the head from `vec` on. From tile 0 on the sums begin at 0.
    template <int kCount>
    void amx_weigh_values(
        const Item& item, int row, int vec, int from, int to, const bf16* weights, size_t score_stride, float (*sums)[kVecSize]
    ) const {
        const size_t pair_bytes = 2 * head_dim_ * sizeof(bf16);
        const int next_head = item.head + heads_per_kv_;
        compiler_fence();
        if (from == 0) {
            zero_accumulators();
        } else {
            _tile_loadd(0, sums, 64);
            if (kCount > 1) _tile_loadd(1, sums + kTileRows, 64);
        }
        for (int tile = from; tile < to; tile++) {
            const T* values = tile_of(item.values, item.head, row, tile, head_dim_) + vec * 2 * kVecSize;
            if (vec == 0 && next_head < num_heads_) prefetch(tile_of(item.keys, next_head, row, tile, 2));
            _tile_loadd(2, weights + tile * kVecSize, score_stride * sizeof(bf16));
            _tile_loadd(4, values, pair_bytes);
            _tile_dpbf16ps(0, 2, 4);
            if constexpr (kCount > 1) {
                _tile_loadd(4, values + 2 * kVecSize, pair_bytes);
                _tile_dpbf16ps(1, 2, 4);
            }
        }
        _tile_stored(0, sums, 64);
        if (kCount > 1) _tile_stored(1, sums + kTileRows, 64);
    }
#endif

    // weights[t] = exp(scale * (scores[t] - max)), up to the next multiple of 16. Returns their sum.
    template <typename Out>
    static float softmax(float* scores, int length, float scale, Out* weights) {
        // Scores beyond the end, computed with the last 16 keys, weigh 0.
        store(scores + length, splat(-INFINITY));
        const int padded = (length + kVecSize - 1) / kVecSize * kVecSize;
        Vec16 maxima = load(scores), sums = {};
        for (int token = kVecSize; token < padded; token += kVecSize) {
            const Vec16 values = load(scores + token);
            maxima = values > maxima ? values : maxima;
        }
        const float max = reduce_max(maxima) * scale;
        for (int token = 0; token < padded; token += kVecSize) {
            const Vec16 shifted = load(scores + token) * scale - max;
            const Vec16 weight = shifted == splat(-INFINITY) ? Vec16{} : exp(shifted);
            store(weights + token, weight);
            sums += weight;
        }
        return reduce_add(sums);
    }

    // Rows of a prompt's chunk that are attended together, and vectors of a head that AMX accumulates at once (tiles 0, 1).
    static constexpr int kChunkRows = 4, kAmxVecs = 2;

    RowGroups groups_;
    std::vector<Scratch> scratch_;
};
