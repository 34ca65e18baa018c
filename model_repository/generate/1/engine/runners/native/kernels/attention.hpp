// Causal attention over the paged KV cache, GQA included. For row r at position p and query head h with KV head h / g:
//   s[t] = scale * q[r][h] . k[t], t from max(0, p - window + 1) to p;  y[r][h] = sum over t of softmax(s)[t] * v[t]
// g = heads_per_kv; softcap, ALiBi and sinks: online_softmax.hpp. Tokens are read in tiles of kTileTokens, which begin at
// multiples of it. A row is summed in one order, whichever rows share its group: its result is the same bits.
//
// Keys and values are of type T: that of y's rows, or int8. In int8 a tile's weights are multiplied by the scales of its values
// and, but for AMX, quantized to int16 (kv_int8.hpp): its sums are integers then, until they are added to earlier tiles'.
//
// Layout: queries and y are [row][head][head_dim]; keys and values: kv_layout.hpp.
// ISA variants: attention_simd.hpp, and attention_amx.hpp where KVLayout uses AMX. Tests: tests/inference/test_native.py,
// test_int8_kv.py. It knows no layers or weights.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "amx.hpp"
#include "attention_amx.hpp"
#include "attention_simd.hpp"
#include "kv_layout.hpp"
#include "online_softmax.hpp"
#include "program.hpp"
#include "rows.hpp"
#include "shared_prefix.hpp"
#include "simd.hpp"
#include "step.hpp"
#include "thread_pool.hpp"

template <typename T>
class Attention : public KVLayout<T> {
  public:
    using KVLayout<T>::kScaled;

    Attention(int num_heads, int heads_per_kv, int head_dim) : KVLayout<T>(num_heads, heads_per_kv, head_dim) {}

    // Before the layers: where each row's key and value go, and which rows are attended together.
    void begin(const Step& step, int threads) {
        KVLayout<T>::begin(step);
        scratch_.resize(threads);
        for (Scratch& scratch : scratch_) scratch.reserve(head_dim_);
        const int items = kItemsPerThread * threads, queries = step.rows * num_heads_ / items;
        split_heads(step.rows * num_heads_ / heads_per_kv_, amx_ ? 1 : items);
        const int rows = std::max(1, std::min(queries, kMaxQueries) / heads_per_item_);
        groups_.build(step, rows, rows);
        order_items(step);
    }

    // This thread's share of all rows and heads.
    template <typename Row>
    void attend(const AttendOp& op, const float* queries, Rows<Row>& output, WorkQueue& queue, int thread) {
        Scratch& scratch = scratch_[thread];
        const T *const keys = this->keys(op.layer), *const values = this->values(op.layer);
        queue.for_each_redundant((int)order_.size(), [&](int i, Claim& claim) {
            const RowGroup& group = groups_[order_[i].group];
            const int kv_head = order_[i].heads / items_per_kv_, first = order_[i].heads % items_per_kv_ * heads_per_item_;
            const int heads = std::min(heads_per_item_, heads_per_kv_ - first), head = kv_head * heads_per_kv_ + first;
            const ItemIndex next = order_[std::min(i + 1, (int)order_.size() - 1)];
            const PagedTokens<T> next_keys = first_tokens(keys, next), next_values = first_tokens(values, next);
            const Item item{op, group, groups_.rows(group), head, heads, group.count * heads, keys, values, &next_keys, &next_values};
            prefetch_queries(next, queries);
            if constexpr (kScaled) attend_item<true>(item, queries, scratch);
            else if (pairs_) attend_item<sizeof(T) == sizeof(bf16)>(item, queries, scratch);
            else attend_item<false>(item, queries, scratch);
            for (int n = 0; n < item.count && claim.acquire(); n++) {
                const float factor = 1.0f / scratch.softmax[n].denominator();
                for (int k = 0; k < head_dim_; k += kVecSize) {
                    const Vec16 sums = load(&scratch.sums[(size_t)n * head_dim_ + k]);
                    store(output.at(row_of(item, n), head_of(item, n) * head_dim_ + k), sums * factor);
                }
            }
        });
        if (scratch.configured) begin_matmul_tiles();
        scratch.configured = 0;
    }

  private:
    using KVLayout<T>::amx_, KVLayout<T>::block_stride_, KVLayout<T>::block_table, KVLayout<T>::block_tokens_;
    using KVLayout<T>::head_dim_, KVLayout<T>::head_offset, KVLayout<T>::heads_per_kv_, KVLayout<T>::num_heads_;
    using KVLayout<T>::pairs_, KVLayout<T>::step_;

    // Queries of an item at most: each key that is loaded is multiplied with all of them.
    static constexpr int kMaxQueries = 48, kItemsPerThread = 2;
    // Room for a vector beyond the tile.
    static constexpr size_t kScoreStride = kTileTokens + kVecSize;

    // Query n of `count` is that of row rows[n / heads] and head `head` + n % heads: of one KV head.
    struct Item {
        const AttendOp& op;
        const RowGroup& group;
        const int* rows;
        int head, heads, count;
        const T *keys, *values;
        // Of the item after this one.
        const PagedTokens<T> *next_keys, *next_values;
    };

    // A group of rows, and query heads: number `heads` of all items_per_kv_ parts of the KV heads.
    struct ItemIndex {
        int group, heads;
    };

    struct Scratch {
        AlignedVector<float> queries, scores, sums;
        AlignedVector<OnlineSoftmax> softmax;
        // In int8: the scales of queries, and of their weights of a tile; those of a tile's values; the tile's sums.
        float query_scales[kMaxQueries], weight_scales[kMaxQueries];
        AlignedVector<float> value_scales;
        AlignedVector<int32_t> tile_sums;
        // See AmxAttention.
        int configured = 0;

        void reserve(int head_dim) {
            queries.resize(kMaxQueries * head_dim);
            scores.resize(kMaxQueries * kScoreStride);
            sums.resize(kMaxQueries * head_dim);
            softmax.resize(kMaxQueries);
            if (!kScaled) return;
            value_scales.resize(kScoreStride);
            tile_sums.resize(kMaxQueries * head_dim);
        }
    };

    // An item is the query heads of a KV head: all of them, but at most a tile's rows, and fewer if `groups` of rows and KV
    // heads would be less than `items`.
    void split_heads(int groups, int items) {
        items_per_kv_ = (heads_per_kv_ + kTileRows - 1) / kTileRows;
        while (items_per_kv_ < heads_per_kv_ && groups * items_per_kv_ < items) items_per_kv_++;
        heads_per_item_ = (heads_per_kv_ + items_per_kv_ - 1) / items_per_kv_;
        items_per_kv_ = (heads_per_kv_ + heads_per_item_ - 1) / heads_per_item_;
    }

    // Neighbouring items read the same keys, or those beside them: of a chunk one head after the other, the longest rows first,
    // so that the threads end together; of other rows one group after the other.
    void order_items(const Step& step) {
        const auto sequence = [&](int group) { return step.sequences[groups_.rows(groups_[group])[0]]; };
        const int heads = num_heads_ / heads_per_kv_ * items_per_kv_;
        order_.clear();
        for (int first = 0, end; first < groups_.size(); first = end) {
            for (end = first + 1; end < groups_.size() && sequence(end) == sequence(first);) end++;
            for (int head = 0; head < heads; head++)
                for (int group = end - 1; group >= first; group--) order_.push_back({group, head});
        }
    }

    // The queries of an item, which matmuls of other threads have written, go into the second-level cache.
    void prefetch_queries(ItemIndex index, const float* queries) const {
        const RowGroup& group = groups_[index.group];
        const int kv_head = index.heads / items_per_kv_, first = index.heads % items_per_kv_ * heads_per_item_;
        const int head = kv_head * heads_per_kv_ + first, numbers = std::min(heads_per_item_, heads_per_kv_ - first) * head_dim_;
        for (int n = 0; n < group.count; n++) {
            const float* const from = queries + ((size_t)groups_.rows(group)[n] * num_heads_ + head) * head_dim_;
            // See PagedTokens::prefetch.
            asm volatile("");
            for (int k = 0; k < numbers; k += kVecSize) __builtin_prefetch(from + k, 0, 2);
        }
    }

    static int row_of(const Item& item, int n) { return item.rows[n / item.heads]; }
    static int head_of(const Item& item, int n) { return item.head + n % item.heads; }

    // The tokens that a row attends to are [first_token(row), end_token(row)).
    int end_token(int row) const { return step_->positions[row] + 1; }
    int first_token(const AttendOp& op, int row) const { return op.window ? std::max(0, end_token(row) - op.window) : 0; }

    template <bool kPairs>
    void attend_item(const Item& item, const float* queries, Scratch& scratch) const {
#ifdef __AMX_BF16__
        if constexpr (kPairs) {
            typedef std::conditional_t<kScaled, Int8AmxAttention, AmxAttention> Amx;
            if (amx_) return attend_by(Amx(head_dim_, kScoreStride, scratch.configured), item, queries, scratch);
        }
#endif
        attend_by(SimdAttention<T, kPairs>(head_dim_, kScoreStride), item, queries, scratch);
    }

    template <typename Matmuls>
    void attend_by(Matmuls matmuls, const Item& item, const float* queries, Scratch& scratch) const {
        auto* const numbers = reinterpret_cast<typename Matmuls::Number*>(scratch.queries.data());
        begin_queries(item, queries, numbers, scratch);
        attend_tiles(item, numbers, matmuls, scratch);
    }

    // Whether queries and weights of this type are quantized.
    template <typename Number>
    static constexpr bool kQuantized = std::is_same_v<Number, int16_t>;

    template <typename Number>
    void begin_queries(const Item& item, const float* queries, Number* to, Scratch& scratch) const {
        for (int n = 0; n < item.count; n++) {
            const ScoreOptions options(item.op, head_of(item, n));
            const float* query = queries + ((size_t)row_of(item, n) * num_heads_ + head_of(item, n)) * head_dim_;
            Number* const numbers = to + (size_t)n * head_dim_;
            if constexpr (kQuantized<Number>)
                scratch.query_scales[n] = quantize(query, head_dim_, numbers) * options.scale;
            for (int k = 0; k < head_dim_; k += kVecSize) {
                if constexpr (!kQuantized<Number>) store_rounded(numbers + k, load(query + k) * options.scale);
                store(&scratch.sums[(size_t)n * head_dim_ + k], Vec16{});
            }
            scratch.softmax[n].begin(options);
        }
    }

    // All queries over the tokens that their rows share, and each row's queries over its own tokens: tile by tile.
    template <typename Number, typename Matmuls>
    void attend_tiles(const Item& item, const Number* queries, Matmuls& matmuls, Scratch& scratch) const {
        int first = end_token(item.rows[0]), end = 0;
        for (int n = 0; n < item.group.count; n++) {
            first = std::min(first, first_token(item.op, item.rows[n]));
            end = std::max(end, end_token(item.rows[n]));
        }
        first = first / kVecSize * kVecSize;
        const int shared = item.group.one_sequence ? end : item.group.shared_blocks * block_tokens_;
        for (int tile = first / kTileTokens * kTileTokens; tile < end; tile += kTileTokens) {
            const int begin = std::max(tile, first), tile_end = std::min(tile + kTileTokens, end);
            // `task(first query, queries, row, first token, last token + 1)`
            const auto for_each_range = [&](auto task) {
                if (begin < shared) task(0, item.count, item.rows[0], begin, std::min(tile_end, shared));
                for (int n = 0; n < item.group.count && !item.group.one_sequence; n++) {
                    const int row = item.rows[n], to = std::min(tile_end, end_token(row));
                    const int own = std::max({begin, shared, first_token(item.op, row) / kVecSize * kVecSize});
                    if (own < to) task(n * item.heads, item.heads, row, own, to);
                }
            };
            for_each_range([&](int n, int count, int row, int from, int to) {
                float* scores = &scratch.scores[n * kScoreStride + from - tile];
                const PagedTokens<T> keys = tokens_of(item.keys, item.head, row, item.next_keys);
                const PagedTokens<T> values = tokens_of(item.values, item.head, row);
                matmuls.score(queries + (size_t)n * head_dim_, scratch.query_scales + n, count, keys, values, from, to, scores);
            });
            weigh_scores<Number>(item, tile, begin, tile_end, scratch);
            for_each_range([&](int n, int count, int row, int from, int to) {
                const Number* weights = reinterpret_cast<const Number*>(&scratch.scores[n * kScoreStride]) + from - tile;
                // Beyond the end weights are 0, up to a multiple of 16.
                const int padded = pairs_ ? (to + 1) / 2 * 2 : to;
                const PagedTokens<T> values = tokens_of(item.values, item.head, row, item.next_values);
                matmuls.weigh(weights, count, values, from, padded, sums_of<Number>(scratch, n));
            });
            if constexpr (kQuantized<Number>) add_tile(item, scratch);
        }
    }

    template <typename Number>
    auto* sums_of(Scratch& scratch, int n) const {
        if constexpr (kQuantized<Number>) return &scratch.tile_sums[(size_t)n * head_dim_];
        else return &scratch.sums[(size_t)n * head_dim_];
    }

    PagedTokens<T> tokens_of(const T* cache, int head, int row, const PagedTokens<T>* next = nullptr) const {
        return {cache + head_offset(head), block_table(row), block_stride_, block_tokens_, head_dim_, end_token(row), next};
    }

    // Those of an item's first row.
    PagedTokens<T> first_tokens(const T* cache, ItemIndex index) const {
        return tokens_of(cache, index.heads / items_per_kv_ * heads_per_kv_, groups_.rows(groups_[index.group])[0]);
    }

    // Scores of a tile's tokens [begin, end) become weights, and the sums so far are multiplied by the softmax's factor.
    template <typename Number>
    void weigh_scores(const Item& item, int tile, int begin, int end, Scratch& scratch) const {
        TileRange ranges[kMaxQueries];
        const int padded_end = (end - tile + kVecSize - 1) / kVecSize * kVecSize;
        for (int n = 0; n < item.count; n++) {
            const int row = row_of(item, n), from = std::max(begin, first_token(item.op, row));
            ranges[n] = {begin - tile, from - tile, std::min(end, end_token(row)) - tile, padded_end};
            const ScoreOptions options(item.op, head_of(item, n));
            const int position = step_->positions[row] - tile;
            scratch.softmax[n].raise_max(&scratch.scores[n * kScoreStride], ranges[n], options, position);
        }
        for (int n = 0; n < item.count; n++) {
            if (kScaled && (n == 0 || (!item.group.one_sequence && n % item.heads == 0)))
                load_value_scales(item, row_of(item, n), tile, begin, end, scratch);
            const float factor = scratch.softmax[n].template weigh<Number, kScaled>(
                &scratch.scores[n * kScoreStride], ranges[n], scratch.value_scales.data(), &scratch.weight_scales[n]
            );
            if (factor == 1.0f) continue;
            float* sums = &scratch.sums[(size_t)n * head_dim_];
            for (int k = 0; k < head_dim_; k += kVecSize) store(sums + k, load(sums + k) * factor);
        }
    }

    // Those of a row's tokens [begin, end). Up to a multiple of 16 they are 0.
    void load_value_scales(const Item& item, int row, int tile, int begin, int end, Scratch& scratch) const {
        if constexpr (kScaled) {
            const PagedTokens<T> values = tokens_of(item.values, item.head, row);
            float* const to = &scratch.value_scales[0] - tile;
            store(to + end, Vec16{});
            for (int token = begin, next; token < end; token = next) {
                next = values.block_end(token, end);
                memcpy(to + token, values.scales(token), (next - token) * sizeof(float));
            }
        }
    }

    // A tile's integer sums, which the next tile begins with 0.
    void add_tile(const Item& item, Scratch& scratch) const {
        for (int n = 0; n < item.count; n++)
            for (size_t k = (size_t)n * head_dim_; k < (size_t)(n + 1) * head_dim_; k += kVecSize) {
                const Vec16 sums = to_vec(load_regs(&scratch.tile_sums[k]));
                store(&scratch.sums[k], load(&scratch.sums[k]) + sums * scratch.weight_scales[n]);
                store(&scratch.tile_sums[k], Reg16i{});
            }
    }

    int items_per_kv_ = 1, heads_per_item_ = 1;
    RowGroups groups_;
    std::vector<ItemIndex> order_;
    std::vector<Scratch> scratch_;
};
