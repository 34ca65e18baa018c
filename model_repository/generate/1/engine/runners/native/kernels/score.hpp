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

    static double sum_of_exp(const float* logits, int count, double max) {
        Doubles sums[kRegsPerVecDoubles] = {};
        for (int i = 0; i < count; i += kVecDoubles) {
            const Logits8 eight(logits, i, count);
            for (int reg = 0; reg < kRegsPerVecDoubles; reg++) {
                const Doubles exponent = __builtin_convertvector(eight.regs[reg], Doubles) - max;
                const Doubles ratio = exp(exponent < kMinExponent ? Doubles{} + kMinExponent : exponent);
                sums[reg] += exponent < kMinExponent ? Doubles{} : ratio;
            }
        }
        double total = 0;
        for (const Doubles& sum : sums)
            for (int n = 0; n < kDoubles; n++) total += sum[n];
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
        int64_t pairs[kVecDoubles], bits = 0;
        memcpy(pairs, &mask, sizeof pairs);
        for (int64_t pair : pairs) bits |= pair;
        return bits != 0;
    }

    std::vector<Token> top_;
};
