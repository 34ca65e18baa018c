// The layout of the paged KV cache, and the stores of a step's new keys and values.
//
// Layout, in a block b of B tokens, for layer l, KV head h of width D, token t of the block and dimension d:
//   key    at b * block_bytes + (2 l) * (H D B) + h * (D B) + d * B + t        [layer][key][head][D][B]
//   value  at b * block_bytes + (2 l + 1) * (H D B) + h * (D B) + t * D + d    [layer][value][head][B][D]
// so that 16 keys, or 16 numbers of a value, are contiguous. The keys and values of all layers lie together in a block, so
// that a sequence uses no more memory than its blocks. block_bytes is Python's (kv_blocks.py): between blocks there may be
// bytes that are not used. In bfloat16, pairs along the summed dimension are contiguous:
//   key    at ... + (d / 2) * 2 B + 2 t + d % 2                                [head][D / 2][B][2]
//   value  at ... + (t / 2) * 2 D + 2 d + t % 2                                [head][B / 2][D][2]
// as AMX and AVX512-BF16 multiply them, and as float32 is extracted with one instruction each, if B % 16 == 0.
// In int8, numbers lie in such pairs too, for an even B, and behind a head's numbers are the B scales of its tokens in float32:
//   key    at ... + h * ((D + 4) B) + (d / 2) * 2 B + 2 t + d % 2, in bytes; its scale at ... + D B + 4 t
// A token's numbers and scale depend on its key, or value, alone (kv_int8.hpp).
// ISA variants: AMX where tiles are available, B % 16 == 0, D % 32 == 0, and numbers are not float32.
// Tests: tests/inference/test_native.py (its shapes cover both), test_int8_kv.py. It knows no attention scores.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "kv_int8.hpp"
#include "rows.hpp"
#include "simd.hpp"
#include "step.hpp"

// Tokens of a tile of attention: its scores for 48 queries, 52 KiB, its keys and its values stay in the second-level cache.
constexpr int kTileTokens = 256;

// The keys, or values, of one KV head of a sequence: its block of token t begins at cache + table[t / B] * block_stride.
template <typename T>
struct PagedTokens {
    const T* cache;
    const int32_t* table;
    size_t block_stride;
    // The tokens from `end` on are not read.
    int block_tokens, head_dim, end;
    // Those that the thread reads next, from their first token on; nullptr: unknown.
    const PagedTokens* next = nullptr;

    const T* block(int token) const { return cache + table[token / block_tokens] * block_stride; }
    // In int8: the scales from this token on.
    const float* scales(int token) const {
        return reinterpret_cast<const float*>(block(token) + head_dim * block_tokens) + token % block_tokens;
    }
    // The end of the tokens from here that lie in one block, at most `to`.
    int block_end(int token, int to) const { return std::min(token / block_tokens * block_tokens + block_tokens, to); }

    // Into the second-level cache, for 16 tokens: all of them if a block holds 16 tokens, the default; with other sizes it is a
    // hint without effect on the result. A block's tokens of one head are too few for the hardware to foresee the next ones.
    void prefetch(int token) const {
        if (token >= end) return;
        const T* const from = block(token);
        // GCC 12 takes a function of prefetches for one without effect, and deletes its calls. This is an effect.
        asm volatile("");
        for (int i = 0; i < head_dim * kVecSize; i += kCacheLine / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
    }

    // What is read `distance` tokens after this one, or after as many as there are.
    void prefetch_after(int token, int distance) const {
        const int ahead = token + std::min(distance, end);
        if (ahead < end) prefetch(ahead);
        else if (next) next->prefetch(ahead - end);
    }
};

template <typename T>
class KVLayout {
  public:
    // Whether numbers have scales. Those of a head are stored together then.
    static constexpr bool kScaled = std::is_same_v<T, int8_t>;

    // Those of a layer in the first block. `begin` has been called.
    T* keys(int layer) const { return static_cast<T*>(step_->kv_cache) + 2 * layer * part_size_; }
    T* values(int layer) const { return keys(layer) + part_size_; }

    // Stores a row's key and value of one KV head, in int8.
    void store_head(int layer, int row, int head, const float* key, const float* value) const {
        T *const keys = this->keys(layer), *const values = this->values(layer);
        const int token = own_token_[row], dim = head_dim_, tokens = block_tokens_;
        const size_t at = own_block_[row] + head * head_size_;
        T numbers[kMaxHeadDim];
        store_scale(keys + at, token, quantize(key, dim, numbers));
        for (int d = 0; d < dim; d += 2) memcpy(keys + at + (size_t)d * tokens + 2 * token, numbers + d, 2);
        store_scale(values + at, token, quantize(value, dim, numbers));
        T* const to = values + at + (size_t)(token / 2) * 2 * dim + token % 2;
        for (int d = 0; d < dim; d++) to[2 * d] = numbers[d];
    }

    // Stores 16 numbers of a row's key, or of its value. `column` counts through all KV heads.
    void store_key(T* keys, int row, int column, Vec16 values) const {
        const int token = own_token_[row];
        T numbers[kVecSize];
        store(numbers, values);
        if (pairs_) {
            T* to = keys + own_block_[row] + (size_t)column * block_tokens_ + 2 * token;
            for (int i = 0; i < kVecSize; i += 2) memcpy(to + i * block_tokens_, numbers + i, 2 * sizeof(T));
            return;
        }
        T* to = keys + own_block_[row] + (size_t)column * block_tokens_ + token;
        for (int i = 0; i < kVecSize; i++) to[(size_t)i * block_tokens_] = numbers[i];
    }

    void store_value(T* values, int row, int column, Vec16 numbers) const {
        const int token = own_token_[row], head = column / head_dim_, dim = column % head_dim_;
        T* of_head = values + own_block_[row] + (size_t)head * block_tokens_ * head_dim_;
        if (!pairs_) return store(of_head + (size_t)token * head_dim_ + dim, numbers);
        T stored[kVecSize];
        store(stored, numbers);
        T* to = of_head + ((size_t)(token / 2) * head_dim_ + dim) * 2 + token % 2;
#ifdef __AVX512BW__
        // One store for all of them. It does not write the other token's numbers: another thread may.
        if constexpr (sizeof(T) == sizeof(bf16)) {
            const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)stored));
            return _mm512_mask_storeu_epi16(to, 0x55555555, pairs);
        }
#endif
        for (int i = 0; i < kVecSize; i++) to[2 * i] = stored[i];
    }

  protected:
    KVLayout(int num_heads, int heads_per_kv, int head_dim)
        : num_heads_(num_heads), heads_per_kv_(heads_per_kv), head_dim_(head_dim) {}

    void begin(const Step& step) {
        step_ = &step;
        block_tokens_ = step.block_tokens;
        pairs_ = kScaled || (sizeof(T) == sizeof(bf16) && block_tokens_ % kVecSize == 0);
        amx_ = pairs_ && block_tokens_ % kVecSize == 0 && head_dim_ % kTileColumns == 0 && uses_amx<bf16>();
        head_size_ = ((size_t)head_dim_ + (kScaled ? sizeof(float) : 0)) * block_tokens_;
        part_size_ = num_heads_ / heads_per_kv_ * head_size_;
        block_stride_ = step.block_bytes / sizeof(T);
        own_block_.resize(step.rows);
        own_token_.resize(step.rows);
        for (int row = 0; row < step.rows; row++) {
            own_block_[row] = block_table(row)[step.positions[row] / block_tokens_] * block_stride_;
            own_token_[row] = step.positions[row] % block_tokens_;
        }
    }

    const int32_t* block_table(int row) const {
        return step_->block_tables + (size_t)step_->sequences[row] * step_->table_width;
    }

    // Offset in a block of the keys, or values, that a query head reads.
    size_t head_offset(int head) const { return head / heads_per_kv_ * head_size_; }

    // GQA: heads_per_kv_ query heads read one KV head.
    const int num_heads_, heads_per_kv_, head_dim_;
    const Step* step_ = nullptr;
    int block_tokens_ = 0;
    bool pairs_ = false, amx_ = false;
    // Numbers from a block to the next one; in a block the keys, or values, of a layer, and those of one head.
    size_t block_stride_ = 0, part_size_ = 0, head_size_ = 0;

  private:
    // The largest head that a program may have: padding.py.
    static constexpr int kMaxHeadDim = 256;

    void store_scale(T* head, int token, float scale) const {
        memcpy(head + (size_t)head_dim_ * block_tokens_ + sizeof scale * token, &scale, sizeof scale);
    }

    // Offset of the block that receives each row's key and value, and the token's index in it.
    std::vector<size_t> own_block_;
    std::vector<int> own_token_;
};
