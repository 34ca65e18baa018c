// Samples a token id from a row of logits x: weight w[i] = floor(2^42 * exp((x[i] - max x) / temperature)); then top-k,
// top-p and min-p, as sampling/logit_filters.py defines them; the result is the first id at which the running sum of the
// kept weights exceeds uniform * (sum of the kept weights). Weights are integers: their sums are the same in any order.
// Temperature 0: the first id of the largest x. A row may have a mask: x[i] is -infinity where bit i of the mask is 0.
//
// Layout: x[i] at logits[row_indices[row] * logit_stride + i]. Bit i of the row's mask: bit i % 32 of
// masks[mask_indices[row] * mask_words + i / 32]. A row is one work item.
// ISA variants: the same compiler vectors in each. Test: tests/inference/test_native_sampling.py, against logit_filters.py.
// It does not know where logits come from.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "simd.hpp"

// Field by field as in structures.py.
struct Sample {
    int32_t rows, vocab_size, logit_stride, mask_words;
    const float* logits;
    // The row of logits of each sample.
    const int32_t* row_indices;
    // No mask at all: null; a row without one: a negative index.
    const uint32_t* masks;
    const int32_t* mask_indices;
    const double* temperatures;
    // 0 or less: all tokens.
    const int32_t* top_k;
    // 1 - top_p: the part of the total weight that the least likely tokens may lose; 0: none.
    const float* top_p_tail;
    const double *min_p, *uniforms;
    int64_t* ids;
};

// A register of doubles, and as many numbers of other types: of a comparison of larger vectors GCC makes one of each number.
constexpr int kDoubles = kFloats / 2;
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));
typedef int64_t Longs __attribute__((vector_size(kDoubles * sizeof(int64_t))));
typedef float HalfFloats __attribute__((vector_size(kDoubles * sizeof(float))));
// Eight numbers in registers: an order of sums that all ISA variants have.
constexpr int kVecDoubles = 8, kRegsPerVecDoubles = kVecDoubles / kDoubles;

// exp(x) for x in [-30, 0]: as exp(Vec16), with the Taylor polynomial of degree 13; error of one to two units in the last
// place.
inline Doubles exp(Doubles x) {
    // 1.5 * 2^52: x + kRoundToInt has the nearest integer in its lowest bits.
    constexpr double kRoundToInt = 6755399441055744.0, kLog2E = 1.4426950408889634;
    constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
    constexpr int kDoubleFractionBits = 52;
    const Doubles shifted = x * kLog2E + kRoundToInt, n = shifted - kRoundToInt;
    const Doubles r = x - n * kLn2High - n * kLn2Low;
    // 1 / 13!, 1 / 12!, … 1 / 0!
    constexpr double kTerms[] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
        1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0,
    };
    Doubles p = {};
#pragma GCC unroll 14
    for (double term : kTerms) p = p * r + term;
    return (Doubles)((Longs)p + ((Longs)shifted << kDoubleFractionBits));
}

// Of eight logits from i, in registers; -infinity behind the last one.
struct Logits8 {
    HalfFloats regs[kRegsPerVecDoubles];

    Logits8(const float* logits, int i, int count) {
        float values[kVecDoubles];
        const bool is_whole = i + kVecDoubles <= count;
        if (!is_whole)
            for (int n = 0; n < kVecDoubles; n++) values[n] = i + n < count ? logits[i + n] : -INFINITY;
        memcpy(regs, is_whole ? logits + i : values, sizeof regs);
    }
};

class Sampler {
  public:
    int64_t sample(const Sample& sample, int row) {
        logits_ = sample.logits + (size_t)sample.row_indices[row] * sample.logit_stride;
        count_ = sample.vocab_size;
        mask_ = nullptr;
        if (sample.masks && sample.mask_indices[row] >= 0)
            apply_mask(sample.masks + (size_t)sample.mask_indices[row] * sample.mask_words);
        const ArgMax best = argmax(logits_, count_);
        // The caller rejects such a row.
        if (!std::isfinite(best.value)) return -1;
        if (sample.temperatures[row] == 0) return best.index;
        compute_weights(best.value, sample.temperatures[row]);
        const int top_k = sample.top_k[row] > 0 && sample.top_k[row] < count_ ? sample.top_k[row] : 0;
        const float tail = sample.top_p_tail[row];
        const double min_weight = sample.min_p[row] * kMaxWeight, uniform = sample.uniforms[row];
        if (!top_k && tail <= 0 && min_weight <= 0) return sample_all(uniform);
        if (top_k) keep_top_k(top_k);
        // Tokens below this weight add up to no more than the tail. The likeliest stays: of equal ones whose tail is all
        // but one, none would.
        else collect(-INFINITY, std::min(tail_weight(tail) / count_, (int64_t)kMaxWeight - 1));
        if (tail > 0) keep_top_p(tail);
        return sample_kept(uniform, min_weight);
    }

  private:
    struct Token {
        float logit;
        int id;
    };

    // Tokens whose weights have a common sum in `sums_`.
    static constexpr int kChunk = 256, kMaskBits = 32;
    // The likeliest token's weight, 2^42: 2^20 tokens do not overflow 63 bits. Below exp(-29.2) a weight
    // is less than 1.
    static constexpr double kMaxWeight = 4398046511104.0, kMinExponent = -29.2;

    // Replaces the row by a copy with -infinity for each token that the mask does not allow.
    void apply_mask(const uint32_t* mask) {
        masked_.resize(count_);
        const int whole = count_ / kMaskBits * kMaskBits;
        for (int i = 0; i < whole; i += kMaskBits) {
            const uint32_t word = mask[i / kMaskBits];
            // Most words allow all of their tokens or none.
            if (word == ~0u) memcpy(&masked_[i], logits_ + i, kMaskBits * sizeof(float));
            else if (!word) std::fill_n(&masked_[i], kMaskBits, -INFINITY);
            else
                for (int n = 0; n < kMaskBits; n++) masked_[i + n] = word >> n & 1 ? logits_[i + n] : -INFINITY;
        }
        for (int i = whole; i < count_; i++) masked_[i] = mask[i / kMaskBits] >> i % kMaskBits & 1 ? logits_[i] : -INFINITY;
        logits_ = masked_.data();
        mask_ = mask;
    }

    // Whether the mask allows no token of this chunk.
    bool is_masked(int chunk) const {
        if (!mask_) return false;
        const int first = chunk * kChunk / kMaskBits, end = (std::min((chunk + 1) * kChunk, count_) + kMaskBits - 1) / kMaskBits;
        return std::all_of(mask_ + first, mask_ + end, [](uint32_t word) { return !word; });
    }

    void compute_weights(float max, double temperature) {
        const int chunks = (count_ + kChunk - 1) / kChunk;
        weights_.resize((size_t)chunks * kChunk);
        sums_.resize(chunks);
        total_ = 0;
        for (int chunk = 0; chunk < chunks; chunk++) {
            if (is_masked(chunk)) {
                std::fill_n(&weights_[chunk * kChunk], kChunk, 0);
                sums_[chunk] = 0;
                continue;
            }
            Longs sums[kRegsPerVecDoubles] = {};
            for (int i = chunk * kChunk; i < (chunk + 1) * kChunk; i += kVecDoubles) {
                const Logits8 logits(logits_, i, count_);
                for (int reg = 0; reg < kRegsPerVecDoubles; reg++) {
                    const Doubles exponent = (__builtin_convertvector(logits.regs[reg], Doubles) - max) / temperature;
                    const Doubles ratio = exp(exponent < kMinExponent ? Doubles{} + kMinExponent : exponent);
                    const Longs whole = __builtin_convertvector(ratio * kMaxWeight, Longs);
                    const Longs weight = exponent < kMinExponent ? Longs{} : whole;
                    memcpy(&weights_[i + reg * kDoubles], &weight, sizeof weight);
                    sums[reg] += weight;
                }
            }
            sums_[chunk] = 0;
            for (const Longs& sum : sums)
                for (int n = 0; n < kDoubles; n++) sums_[chunk] += sum[n];
            total_ += sums_[chunk];
        }
    }

    int64_t tail_weight(float tail) const { return (int64_t)(tail * (double)total_); }

    static int64_t target(double uniform, int64_t total) { return std::min((int64_t)(uniform * (double)total), total - 1); }

    // The first id at which the running sum of the weights exceeds the target.
    int64_t sample_all(double uniform) const {
        int64_t left = target(uniform, total_);
        int id = 0;
        for (; left >= sums_[id / kChunk]; id += kChunk) left -= sums_[id / kChunk];
        for (; left >= weights_[id]; id++) left -= weights_[id];
        return id;
    }

    int64_t sample_kept(double uniform, double min_weight) const {
        int64_t total = 0;
        for (const Token& token : kept_)
            if (weights_[token.id] >= min_weight) total += weights_[token.id];
        int64_t left = target(uniform, total);
        for (const Token& token : kept_) {
            if (weights_[token.id] < min_weight) continue;
            if (left < weights_[token.id]) return token.id;
            left -= weights_[token.id];
        }
        return 0;
    }

    // Keeps the tokens above this weight with at least this logit, in the order of their ids.
    void collect(float min_logit, int64_t weight) {
        kept_.clear();
        for (int id = 0; id < count_; id++)
            if (weights_[id] > weight && logits_[id] >= min_logit) kept_.push_back({logits_[id], id});
    }

    // Keeps the k likeliest tokens, and the equals of the last one.
    void keep_top_k(int k) {
        // A lower bound of the k-th largest logit: that of the maxima of 16 logits each.
        maxima_.clear();
        for (int i = 0; i < count_; i += kVecSize)
            maxima_.push_back(*std::max_element(logits_ + i, logits_ + std::min(i + kVecSize, count_)));
        float bound = -INFINITY;
        if ((size_t)k <= maxima_.size()) {
            std::nth_element(maxima_.begin(), maxima_.begin() + k - 1, maxima_.end(), std::greater<float>());
            bound = maxima_[k - 1];
        }
        collect(bound, 0);
        total_ = 0;
        if (kept_.size() > (size_t)k) {
            order_ = kept_;
            std::nth_element(order_.begin(), order_.begin() + k - 1, order_.end(), likelier);
            const float last = order_[k - 1].logit;
            kept_.erase(std::remove_if(kept_.begin(), kept_.end(), [&](const Token& t) { return t.logit < last; }), kept_.end());
        }
        for (const Token& token : kept_) total_ += weights_[token.id];
    }

    static bool likelier(const Token& one, const Token& other) { return one.logit > other.logit; }

    // Keeps the fewest of the likeliest tokens that weigh at least total - tail; among equals the higher ids. A quickselect:
    // it partitions the tokens by a pivot, and goes on in the part that holds the boundary.
    void keep_top_p(float tail) {
        int64_t needed = std::max<int64_t>(total_ - tail_weight(tail), 1);
        order_ = kept_;
        auto from = order_.begin(), to = order_.end();
        while (true) {
            const float pivot = (from + (to - from) / 2)->logit;
            const auto equal = std::partition(from, to, [&](const Token& t) { return t.logit > pivot; });
            const auto below = std::partition(equal, to, [&](const Token& t) { return t.logit == pivot; });
            int64_t above = 0;
            for (auto token = from; token != equal; token++) above += weights_[token->id];
            if (above >= needed) {
                to = equal;
                continue;
            }
            needed -= above;
            const int64_t each = weights_[equal->id], equals = below - equal;
            if (each * equals >= needed || below == to) {
                const int64_t kept_equals = std::min((needed + each - 1) / each, equals);
                return cut(pivot, equals - kept_equals);
            }
            needed -= each * equals;
            from = below;
        }
    }

    // Removes the tokens below this logit, and `equals` of those that have it.
    void cut(float last, int64_t equals) {
        const auto is_removed = [&](const Token& t) { return t.logit < last || (t.logit == last && equals-- > 0); };
        size_t size = 0;
        for (const Token& token : kept_)
            if (!is_removed(token)) kept_[size++] = token;
        kept_.resize(size);
    }

    const float* logits_ = nullptr;
    const uint32_t* mask_ = nullptr;
    std::vector<float> masked_;
    int count_ = 0;
    int64_t total_ = 0;
    AlignedVector<int64_t> weights_;
    std::vector<int64_t> sums_;
    std::vector<float> maxima_;
    std::vector<Token> kept_, order_;
};
