// Log-probabilities of a row of logits x: log p(i) = x[i] - max x - log(sum over j of exp(x[j] - max x)), summed in double:
// of one given token, and of the likeliest ones, largest first and equals by their ids.
//
// Layout: x[i] at logits[row_indices[row] * logit_stride + i]. A row is one work item, summed in one order.
// ISA variants: the same compiler vectors in each. Test: tests/inference/test_logprobs.py, against torch (logprobs.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "sample.hpp"
#include "simd.hpp"

// Field by field as in structures.py.
struct Score {
    int32_t rows, vocab_size, logit_stride, alternatives;
    const float* logits;
    // The row of logits of each result, and its token.
    const int32_t* row_indices;
    const int64_t* ids;
    // finite[rows]: whether the maximum is finite; token_logprobs[rows]; top_ids and top_logprobs, [rows][alternatives].
    uint8_t* finite;
    float* token_logprobs;
    int64_t* top_ids;
    float* top_logprobs;
};

class Scorer {
  public:
    void score(const Score& score, int row) {
        const float* logits = score.logits + (size_t)score.row_indices[row] * score.logit_stride;
        const int count = score.vocab_size, alternatives = score.alternatives;
        int64_t* top_ids = score.top_ids + (size_t)row * alternatives;
        float* top_logprobs = score.top_logprobs + (size_t)row * alternatives;
        const float max = argmax(logits, count).value;
        score.finite[row] = std::isfinite(max);
        score.token_logprobs[row] = 0;
        std::fill_n(top_ids, alternatives, 0);
        std::fill_n(top_logprobs, alternatives, 0.0f);
        if (!score.finite[row]) return;
        const double log_sum = std::log(sum_of_exp(logits, count, max));
        const auto logprob = [&](int64_t id) { return (float)((double)logits[id] - (double)max - log_sum); };
        score.token_logprobs[row] = logprob(score.ids[row]);
        find_top(logits, count, alternatives);
        for (int n = 0; n < alternatives; n++) top_ids[n] = top_[n].id, top_logprobs[n] = logprob(top_[n].id);
    }

  private:
    struct Token {
        float logit;
        int id;
    };

    // Tokens below exp(-29.2) times the likeliest one's probability are left out of the sum, as in sample.hpp: all of them
    // together do not change a float32.
    static constexpr double kMinExponent = -29.2;
    static constexpr int kVecDoubles = 8;

    static double sum_of_exp(const float* logits, int count, double max) {
        Vec8d sum = {};
        for (int i = 0; i < count; i += kVecDoubles) {
            Vec8f values;
            if (i + kVecDoubles <= count) memcpy(&values, logits + i, sizeof values);
            else
                for (int n = 0; n < kVecDoubles; n++) values[n] = i + n < count ? logits[i + n] : -INFINITY;
            const Vec8d exponent = __builtin_convertvector(values, Vec8d) - max;
            const Vec8d ratio = exp(exponent < kMinExponent ? Vec8d{} + kMinExponent : exponent);
            sum += exponent < kMinExponent ? Vec8d{} : ratio;
        }
        double total = 0;
        for (int n = 0; n < kVecDoubles; n++) total += sum[n];
        return total;
    }

    static bool is_better(const Token& one, const Token& other) {
        return one.logit > other.logit || (one.logit == other.logit && one.id < other.id);
    }

    // A heap whose front is the worst of the best so far. Ids come in order, so an equal of the worst one stays out.
    void find_top(const float* logits, int count, int alternatives) {
        top_.clear();
        if (!alternatives) return;
        int id = 0;
        for (; id < alternatives; id++) top_.push_back({logits[id], id});
        std::make_heap(top_.begin(), top_.end(), is_better);
        const auto examine = [&](int end) {
            for (; id < end; id++) {
                if (!(logits[id] > top_.front().logit)) continue;
                std::pop_heap(top_.begin(), top_.end(), is_better);
                top_.back() = {logits[id], id};
                std::push_heap(top_.begin(), top_.end(), is_better);
            }
        };
        for (; id + kVecSize <= count; id += kVecSize) {
            const Vec16i above = load(logits + id) > splat(top_.front().logit);
            if (any(above)) examine(id + kVecSize), id -= kVecSize;
        }
        examine(count);
        std::sort_heap(top_.begin(), top_.end(), is_better);
    }

    static bool any(Vec16i mask) {
        const Vec8l halves = (Vec8l)mask;
        int64_t bits = 0;
        for (int n = 0; n < kVecDoubles; n++) bits |= halves[n];
        return bits != 0;
    }

    std::vector<Token> top_;
};
