// The softmax of a query's scores, a tile of tokens at a time: with m the maximum so far,
//   weights[t] = exp(s[t] - m);  denominator = sum of weights, and of exp(sink - m) with a sink
// A new maximum multiplies what is summed so far by exp(old m - m). A score may first be changed:
//   s[t] = softcap * tanh(s[t] / softcap) with a softcap;  s[t] += slope * (t - p) with ALiBi, at position p
// The order of additions depends on the positions of tokens alone: tokens that a query does not attend to weigh exactly 0.
//
// Layout: weights take the place of scores: Number w of token t lies at its index t, from the same address.
// ISA variants: __AVX512BF16__ rounds weights by one instruction; otherwise those of simd.hpp.
// Test: tests/inference/test_native.py. It knows no keys or values.
#pragma once

#include <cmath>

#include "activation.hpp"
#include "simd.hpp"

inline void store_weights(float* to, Vec16 weights) { store(to, weights); }

inline void store_weights(bf16* to, Vec16 weights) {
#ifdef __AVX512BF16__
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights);
    memcpy(to, &rounded, sizeof rounded);
#else
    store(to, weights);
#endif
}

// Of the tokens of a tile, a query attends to [begin, end); weights are written in [from, to), multiples of 16.
struct TileRange {
    int from, begin, end, to;
};

struct ScoreOptions {
    float softcap, slope;
};

class OnlineSoftmax {
  public:
    // `sink` is a further logit, or null.
    void begin(const float* sink) {
        max_ = sink ? *sink : -INFINITY;
        sums_ = Vec16{};
        if (sink) sums_[0] = 1.0f;
    }

    // Scores of token t, relative to the query's position at `position`, become weights. Returns the factor of earlier sums.
    // There is room for 16 scores beyond the tile.
    template <typename Number>
    float weigh(float* scores, const TileRange& tile, const ScoreOptions& options, int position) {
        Number* const weights = reinterpret_cast<Number*>(scores);
        const int first = tile.begin / kVecSize * kVecSize, last = (tile.end + kVecSize - 1) / kVecSize * kVecSize;
        if (tile.begin >= tile.end) {
            clear(weights, tile.from, tile.to);
            return 1.0f;
        }
        if (options.softcap || options.slope) change_scores(scores, first, last, options, position);
        for (int t = first; t < tile.begin; t++) scores[t] = -INFINITY;
        store(scores + tile.end, splat(-INFINITY));
        const float before = max_;
        raise_max(scores, first, last);
        clear(weights, tile.from, first);
        Vec16 sums = {};
        for (int t = first; t < last; t += kVecSize) {
            const Vec16 weight = exp_to_zero(load(scores + t) - max_);
            store_weights(weights + t, weight);
            sums += weight;
        }
        clear(weights, last, tile.to);
        const float factor = before == max_ ? 1.0f : exp_to_zero(splat(before - max_))[0];
        sums_ = sums_ * factor + sums;
        return factor;
    }

    float denominator() const { return reduce_add(sums_); }

  private:
    template <typename Number>
    static void clear(Number* weights, int from, int to) {
        for (int t = from; t < to; t += kVecSize) store_weights(weights + t, Vec16{});
    }

    static void change_scores(float* scores, int first, int last, const ScoreOptions& options, int position) {
        const Vec16 indices = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int t = first; t < last; t += kVecSize) {
            Vec16 score = load(scores + t);
            if (options.softcap) score = options.softcap * tanh(score / options.softcap);
            if (options.slope) score += options.slope * (indices + (float)(t - position));
            store(scores + t, score);
        }
    }

    void raise_max(const float* scores, int first, int last) {
        Vec16 maxima = load(scores + first);
        for (int t = first + kVecSize; t < last; t += kVecSize) {
            const Vec16 values = load(scores + t);
            maxima = values > maxima ? values : maxima;
        }
#ifdef __AVX512F__
        const float max = _mm512_reduce_max_ps((__m512)maxima);
#else
        const float max = reduce_max(maxima);
#endif
        max_ = max > max_ ? max : max_;
    }

    // exp(x) for x <= 0, and 0 where it is less than the smallest normal number: -infinity gives 0.
    static Vec16 exp_to_zero(Vec16 x) {
        const Vec16 result = exp(x);
        return x < -87.0f ? Vec16{} : result;
    }

    float max_;
    // The denominator, of tokens t by t % 16.
    Vec16 sums_;
};
