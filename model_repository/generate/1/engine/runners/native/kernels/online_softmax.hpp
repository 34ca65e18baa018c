// The softmax of a query's scores, a tile of tokens at a time: with m the maximum so far,
//   weights[t] = 2^(s[t] - m);  denominator = sum of weights, and of 2^(sink - m) with a sink
// A new maximum multiplies what is summed so far by 2^(old m - m). Scores are in base 2: s[t] = log2(e) * scale * q . k[t],
// or with a softcap softcap * log2(e) * tanh(scale / softcap * q . k[t]), and with ALiBi slope * log2(e) * (t - p) is added,
// at position p. The order of additions depends on the positions of tokens alone: tokens that a query does not attend to
// weigh exactly 0. With values in int8, weights are multiplied by the values' scales, and quantized to int16 (kv_int8.hpp) where
// they are not multiplied in bfloat16.
//
// Layout: weights take the place of scores: Number w of token t lies at its index t, from the same address.
// ISA variants: __AVX512F__ has instructions for 2^x, and __AVX512BF16__ one that rounds weights; otherwise registers of
// simd.hpp. Test: tests/inference/test_native.py. It knows no keys or values.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "activation.hpp"
#include "kv_int8.hpp"
#include "program.hpp"
#include "simd.hpp"

constexpr float kLog2E = 1.44269504f;

// Operands of a matmul: to bfloat16 only where an instruction multiplies it.
inline void store_rounded(float* to, Vec16 numbers) { store(to, numbers); }

#ifdef __AVX512BF16__
inline void store_rounded(bf16* to, Vec16 numbers) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)numbers);
    memcpy(to, &rounded, sizeof rounded);
}
#endif

// 2^x for x <= 0: 2^n * p(x - n), n = round(x).
inline Floats exp2_nonpositive(Floats x) {
#ifdef __AVX512F__
    const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    return (Floats)_mm512_scalef_ps((__m512)exp2_fraction(x - (Floats)n), n);
#else
    // Of x + kShift the lowest bits are n + 127, the exponent of 2^n: see kRoundToInt. Less than 2^-126 is 2^-126.
    constexpr float kLowest = -126.0f, kShift = kRoundToInt + 127;
    constexpr int kFractionBits = 23;
    x = x < kLowest ? Floats{} + kLowest : x;
    const Floats shifted = x + kShift;
    return exp2_fraction(x - (shifted - kShift)) * (Floats)((RegUint)shifted << kFractionBits);
#endif
}

// Of the tokens of a tile, a query attends to [begin, end); weights are written in [from, to), multiples of 16.
struct TileRange {
    int from, begin, end, to;

    // The vectors that hold [begin, end).
    int first() const { return begin / kVecSize * kVecSize; }
    int last() const { return (end + kVecSize - 1) / kVecSize * kVecSize; }
};

// What is done to the scores of one head.
struct ScoreOptions {
    // The factor of queries, by which scores come in base 2, or before the softcap.
    float scale, softcap, slope;
    const float* sink;

    ScoreOptions(const AttendOp& op, int head)
        : scale(op.softcap ? op.scale / op.softcap : op.scale * kLog2E), softcap(op.softcap * kLog2E),
          slope(op.slopes ? op.slopes[head] * kLog2E : 0.0f), sink(op.sinks ? op.sinks + head : nullptr) {}
};

class OnlineSoftmax {
  public:
    void begin(const ScoreOptions& options) {
        max_ = options.sink ? *options.sink * kLog2E : -INFINITY;
        sums_ = Vec16{};
        if (options.sink) sums_[0] = 1.0f;
    }

    // The first half of a tile: changes scores of token t, relative to the query's position at `position`, and takes their
    // maximum. There is room for 16 scores beyond the tile. Two halves, so that all queries' maxima are computed before the
    // first exponential waits for one.
    void raise_max(float* scores, const TileRange& tile, const ScoreOptions& options, int position) {
        before_ = max_;
        if (tile.begin >= tile.end) return;
        const int first = tile.first(), last = tile.last();
        if (options.softcap || options.slope) change_scores(scores, first, last, options, position);
        for (int t = first; t < tile.begin; t++) scores[t] = -INFINITY;
        store(scores + tile.end, splat(-INFINITY));
        const float max = max_of(scores, first, last);
        max_ = max > max_ ? max : max_;
    }

    // The second half: scores become weights. Returns the factor of earlier sums. With `kScaled` weights are multiplied by
    // value_scales[t]; those in int16 get a scale, `weight_scale`.
    template <typename Number, bool kScaled>
    float weigh(float* scores, const TileRange& tile, const float* value_scales, float* weight_scale) {
        Number* const weights = reinterpret_cast<Number*>(scores);
        if (tile.begin >= tile.end) {
            clear(weights, tile.from, tile.to);
            *weight_scale = 0.0f;
            return 1.0f;
        }
        const int first = tile.first(), last = tile.last();
        Vec16 sums;
        if constexpr (std::is_same_v<Number, int16_t>) {
            MaxMagnitude max;
            const auto keep = [&](int t, Vec16 of_tokens) {
                const Vec16 scaled = of_tokens * load(value_scales + t);
                max.add(scaled);
                store(scores + t, scaled);
            };
            sums = exponentiate(scores, tile, keep);
            *weight_scale = quantize(scores + first, last - first, max.get(), weights + first);
        } else {
            sums = exponentiate(scores, tile, [&](int t, Vec16 of_tokens) {
                store_rounded(weights + t, kScaled ? of_tokens * load(value_scales + t) : of_tokens);
            });
        }
        clear(weights, tile.from, first);
        clear(weights, last, tile.to);
        const float factor = before_ == max_ ? 1.0f : exp2_nonpositive(Floats{} + (before_ - max_))[0];
        sums_ = sums_ * factor + sums;
        return factor;
    }

    float denominator() const { return reduce_add(sums_); }

  private:
    template <typename Number>
    static void clear(Number* weights, int from, int to) {
        if (from < to) memset(weights + from, 0, (to - from) * sizeof(Number));
    }

    static void change_scores(float* scores, int first, int last, const ScoreOptions& options, int position) {
        const Vec16 indices = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int t = first; t < last; t += kVecSize) {
            Vec16 score = load(scores + t);
            if (options.softcap) score = options.softcap * tanh(score);
            if (options.slope) score += options.slope * (indices + (float)(t - position));
            store(scores + t, score);
        }
    }

    static Floats load_floats(const float* from) {
        Floats floats;
        memcpy(&floats, from, sizeof floats);
        return floats;
    }

    static float max_of(const float* scores, int first, int last) {
        Floats maxima = load_floats(scores + first);
        for (int t = first + kFloats; t < last; t += kFloats) {
            const Floats values = load_floats(scores + t);
            maxima = values > maxima ? values : maxima;
        }
#ifdef __AVX512F__
        return _mm512_reduce_max_ps((__m512)maxima);
#else
        float max = maxima[0];
        for (int i = 1; i < kFloats; i++) max = maxima[i] > max ? maxima[i] : max;
        return max;
#endif
    }

    // Calls `keep(t, weights of 16 tokens)`, weights[t] = 2^(scores[t] - max_). Returns the sums of those with the same t % 16.
    template <typename Keep>
    Vec16 exponentiate(const float* scores, const TileRange& tile, Keep keep) const {
        constexpr int kParts = kVecSize / kFloats;
        // Not the member: the compiler would load it again after each store of weights.
        const float max = max_;
        Floats sums[kParts] = {};
        for (int t = tile.first(); t < tile.last(); t += kVecSize) {
            Floats parts[kParts];
            const bool masked = t < tile.begin || t + kVecSize > tile.end;
            for (int i = 0; i < kParts; i++) {
                const Floats score = load_floats(scores + t + i * kFloats);
                parts[i] = exp2_nonpositive(score - max);
                // Of scores that are masked the exponential function above is no number, or not 0.
                if (masked) parts[i] = score == -INFINITY ? Floats{} : parts[i];
                sums[i] += parts[i];
            }
            Vec16 of_tokens;
            memcpy(&of_tokens, parts, sizeof of_tokens);
            keep(t, of_tokens);
        }
        Vec16 all;
        memcpy(&all, sums, sizeof all);
        return all;
    }

    float max_, before_;
    // The denominator, of tokens t by t % 16.
    Vec16 sums_;
};
