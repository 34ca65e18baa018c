// From a row of logits to one token by chance: temperature, top-k, top-p and min-p as logit_filters.py has them. Weights
// are whole numbers, whose sums are the same in any order. It knows nothing of where logits come from.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "lanes.hpp"

// The same fields, in the same order, as the structure in structures.py.
struct Draw {
    int32_t rows, vocabulary, stride;
    const float* logits;
    // Which rows of them are drawn from.
    const int32_t* numbers;
    const double* temperatures;
    // How many of the likeliest may be drawn; none or less: all.
    const int32_t* top_k;
    // The share of the whole weight that the least likely may lose; 0: none.
    const float* lost;
    const double *min_p, *uniforms;
    int64_t* ids;
};

typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef float EightFloats __attribute__((vector_size(32)));

// e to the x for x from -30 to 0, to the last place but one.
inline Doubles exp(Doubles x) {
    // Adding this leaves the nearest whole number in the lowest bits.
    constexpr double kMagic = 6755399441055744.0;
    const Doubles shifted = x * 1.4426950408889634 + kMagic, n = shifted - kMagic;
    const Doubles r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
    constexpr double kTerms[] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
        1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0,
    };
    Doubles p = {};
    for (double term : kTerms) p = p * r + term;
    return (Doubles)((Longs)p + ((Longs)shifted << 52));
}

class Drawer {
  public:
    int64_t draw(const Draw& draw, int row) {
        logits_ = draw.logits + (size_t)draw.numbers[row] * draw.stride;
        count_ = draw.vocabulary;
        const Best best = best_of(logits_, count_);
        // The caller refuses such a row.
        if (!std::isfinite(best.value)) return 0;
        weigh(best.value, draw.temperatures[row]);
        const int top_k = draw.top_k[row] > 0 && draw.top_k[row] < count_ ? draw.top_k[row] : 0;
        const float lost = draw.lost[row];
        const double least = draw.min_p[row] * kFull, uniform = draw.uniforms[row];
        if (!top_k && lost <= 0 && least <= 0) return from_all(uniform);
        if (top_k) keep_top_k(top_k);
        // All of those together weigh no more than what may be lost.
        else collect(-INFINITY, losable(lost) / count_);
        if (lost > 0) keep_top_p(lost);
        return from_kept(uniform, least);
    }

  private:
    struct Token {
        float logit;
        int id;
    };

    static constexpr int kEight = 8, kPiece = 256;
    // The likeliest token's weight; and where a token's becomes nothing.
    static constexpr double kFull = 4398046511104.0, kLeast = -29.2;

    void weigh(float best, double temperature) {
        const int pieces = (count_ + kPiece - 1) / kPiece;
        weights_.resize((size_t)pieces * kPiece);
        sums_.resize(pieces);
        total_ = 0;
        for (int piece = 0; piece < pieces; piece++) {
            Longs sum = {};
            for (int i = piece * kPiece; i < (piece + 1) * kPiece; i += kEight) {
                EightFloats found;
                if (i + kEight <= count_) memcpy(&found, logits_ + i, sizeof found);
                else
                    for (int n = 0; n < kEight; n++) found[n] = i + n < count_ ? logits_[i + n] : -INFINITY;
                const Doubles apart = (__builtin_convertvector(found, Doubles) - best) / temperature;
                const Doubles ratio = exp(apart < kLeast ? Doubles{} + kLeast : apart);
                const Longs weight = apart < kLeast ? Longs{} : __builtin_convertvector(ratio * kFull, Longs);
                memcpy(&weights_[i], &weight, sizeof weight);
                sum += weight;
            }
            sums_[piece] = 0;
            for (int n = 0; n < kEight; n++) sums_[piece] += sum[n];
            total_ += sums_[piece];
        }
    }

    int64_t losable(float lost) const { return (int64_t)(lost * (double)total_); }

    static int64_t target(double uniform, int64_t total) { return std::min((int64_t)(uniform * (double)total), total - 1); }

    // The first token, by its id, at which the weights so far pass the target.
    int64_t from_all(double uniform) const {
        int64_t left = target(uniform, total_);
        int id = 0;
        for (; left >= sums_[id / kPiece]; id += kPiece) left -= sums_[id / kPiece];
        for (; left >= weights_[id]; id++) left -= weights_[id];
        return id;
    }

    int64_t from_kept(double uniform, double least) const {
        int64_t total = 0;
        for (const Token& token : kept_)
            if (weights_[token.id] >= least) total += weights_[token.id];
        int64_t left = target(uniform, total);
        for (const Token& token : kept_) {
            if (weights_[token.id] < least) continue;
            if (left < weights_[token.id]) return token.id;
            left -= weights_[token.id];
        }
        return 0;
    }

    // In the order of their ids.
    void collect(float logit, int64_t weight) {
        kept_.clear();
        for (int id = 0; id < count_; id++)
            if (weights_[id] > weight && logits_[id] >= logit) kept_.push_back({logits_[id], id});
    }

    // The equals of the last one stay.
    void keep_top_k(int k) {
        // So many pieces hold a logit that is no smaller: so many tokens do at least.
        most_.clear();
        for (int i = 0; i < count_; i += kLanes)
            most_.push_back(*std::max_element(logits_ + i, logits_ + std::min(i + kLanes, count_)));
        float bound = -INFINITY;
        if ((size_t)k <= most_.size()) {
            std::nth_element(most_.begin(), most_.begin() + k - 1, most_.end(), std::greater<float>());
            bound = most_[k - 1];
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

    // The fewest of the likeliest that weigh what may not be lost; among equals the higher ids stay.
    void keep_top_p(float lost) {
        int64_t needed = std::max<int64_t>(total_ - losable(lost), 1);
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
                const int64_t stay = std::min((needed + each - 1) / each, equals);
                return cut(pivot, equals - stay);
            }
            needed -= each * equals;
            from = below;
        }
    }

    // What is below the last logit, and so many of its equals.
    void cut(float last, int64_t equals) {
        const auto goes = [&](const Token& t) { return t.logit < last || (t.logit == last && equals-- > 0); };
        size_t stay = 0;
        for (const Token& token : kept_)
            if (!goes(token)) kept_[stay++] = token;
        kept_.resize(stay);
    }

    const float* logits_ = nullptr;
    int count_ = 0;
    int64_t total_ = 0;
    Numbers<int64_t> weights_;
    std::vector<int64_t> sums_;
    std::vector<float> most_;
    std::vector<Token> kept_, order_;
};
