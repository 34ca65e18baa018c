// Log-probabilities of a row of logits x: log p(i) = x[i] - max x - log(sum over j of exp(x[j] - max x)), the sum in double;
// of one given token and of the best ones, the largest first and equals by their ids. One row is one work item, in an
// order that no other row changes. Each ISA variant compiles the same vector code; tests/inference/test_scoring.py holds it
// to torch's (scoring.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "draw.hpp"
#include "lanes.hpp"

// The same fields, in the same order, as the structure in structures.py.
struct Score {
    int32_t rows, vocabulary, stride, alternatives;
    const float* logits;
    // Which rows of them, and the token of each.
    const int32_t* numbers;
    const int64_t* ids;
    // usable[rows], own[rows]; best_ids[rows][alternatives] and best[rows][alternatives].
    uint8_t* usable;
    float* own;
    int64_t* best_ids;
    float* best;
};

class Scorer {
  public:
    void score(const Score& score, int row) {
        const float* logits = score.logits + (size_t)score.numbers[row] * score.stride;
        const int count = score.vocabulary, alternatives = score.alternatives;
        int64_t* best_ids = score.best_ids + (size_t)row * alternatives;
        float* best = score.best + (size_t)row * alternatives;
        const float most = best_of(logits, count).value;
        score.usable[row] = std::isfinite(most);
        score.own[row] = 0;
        std::fill_n(best_ids, alternatives, 0);
        std::fill_n(best, alternatives, 0.0f);
        if (!score.usable[row]) return;
        const double log_sum = std::log(sum_of_exp(logits, count, most));
        const auto logprob = [&](int64_t id) { return (float)((double)logits[id] - (double)most - log_sum); };
        score.own[row] = logprob(score.ids[row]);
        find_best(logits, count, alternatives);
        for (int n = 0; n < alternatives; n++) best_ids[n] = best_[n].id, best[n] = logprob(best_[n].id);
    }

  private:
    struct Token {
        float logit;
        int id;
    };

    // What is less likely than e^-29.2 times the likeliest token adds nothing, as in draw.hpp: all of them together would
    // change no float.
    static constexpr double kLeast = -29.2;
    static constexpr int kEight = 8;

    static double sum_of_exp(const float* logits, int count, double most) {
        Doubles sum = {};
        for (int i = 0; i < count; i += kEight) {
            EightFloats found;
            if (i + kEight <= count) memcpy(&found, logits + i, sizeof found);
            else
                for (int n = 0; n < kEight; n++) found[n] = i + n < count ? logits[i + n] : -INFINITY;
            const Doubles apart = __builtin_convertvector(found, Doubles) - most;
            const Doubles ratio = exp(apart < kLeast ? Doubles{} + kLeast : apart);
            sum += apart < kLeast ? Doubles{} : ratio;
        }
        double total = 0;
        for (int n = 0; n < kEight; n++) total += sum[n];
        return total;
    }

    static bool better(const Token& one, const Token& other) {
        return one.logit > other.logit || (one.logit == other.logit && one.id < other.id);
    }

    // A heap whose front is the worst of the best so far. Ids come in order, so an equal of the worst one stays out.
    void find_best(const float* logits, int count, int alternatives) {
        best_.clear();
        if (!alternatives) return;
        int id = 0;
        for (; id < alternatives; id++) best_.push_back({logits[id], id});
        std::make_heap(best_.begin(), best_.end(), better);
        const auto look_at = [&](int end) {
            for (; id < end; id++) {
                if (!(logits[id] > best_.front().logit)) continue;
                std::pop_heap(best_.begin(), best_.end(), better);
                best_.back() = {logits[id], id};
                std::push_heap(best_.begin(), best_.end(), better);
            }
        };
        for (; id + kLanes <= count; id += kLanes) {
            const Ints above = load(logits + id) > splat(best_.front().logit);
            if (any(above)) look_at(id + kLanes), id -= kLanes;
        }
        look_at(count);
        std::sort_heap(best_.begin(), best_.end(), better);
    }

    static bool any(Ints mask) {
        typedef int64_t EightLongs __attribute__((vector_size(64)));
        const EightLongs halves = (EightLongs)mask;
        int64_t found = 0;
        for (int n = 0; n < kEight; n++) found |= halves[n];
        return found != 0;
    }

    std::vector<Token> best_;
};
