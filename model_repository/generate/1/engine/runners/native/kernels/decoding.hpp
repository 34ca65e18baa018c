// Several decoding steps of the same sequences in one call: each computes the token that the step before it has chosen.
//   tokens[n][i] = the token of logit row i after step n: of the largest logit, or a sample (sample.hpp)
// It ends early after a step in which a sequence gets an end token or a row of logits is not finite, once its time is over, or once
// `interrupt` is set.
//
// Layout: below. ISA variants: none of its own. Test: tests/inference/test_multi_step.py.
// It knows neither texts nor when the caller wants to be asked again.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <vector>

#include "interpreter.hpp"
#include "sample.hpp"
#include "step.hpp"
#include "thread_pool.hpp"

// Field by field as in structures.py.
struct Decoding {
    // Steps at most, and the time in which the last of them begins.
    int32_t steps;
    double seconds;
    // Set by another thread.
    const int32_t* interrupt;
    // Those of the first step, one row for each sequence; the later steps' are written to them.
    int32_t *ids, *positions;
    // The end tokens of logit row i: end_ids[end_starts[i]] to end_ids[end_starts[i + 1] - 1].
    const int32_t *end_ids, *end_starts;
    // How the rows are sampled, with uniforms[steps][rows]; those of temperature 0 are not. Null: none is.
    const Sample* sample;
    // [steps][rows]. A row without a finite logit has no token.
    int64_t* tokens;
    float* max_logits;
};

class DecodingLoop {
  public:
    DecodingLoop(Decoder& decoder, ThreadPool& pool, std::vector<Sampler>& samplers, const Step& step, const Decoding& decoding)
        : decoder_(decoder), pool_(pool), samplers_(samplers), step_(step), decoding_(decoding) {}

    // The number of steps.
    int run() {
        const int rows = step_.logit_count;
        const auto start = std::chrono::steady_clock::now();
        for (int n = 0;; n++) {
            step_.argmax_ids = decoding_.tokens + (size_t)n * rows;
            step_.max_logits = decoding_.max_logits + (size_t)n * rows;
            decoder_.step(pool_, step_);
            if (decoding_.sample) sample(n);
            const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
            if (n + 1 == decoding_.steps || elapsed.count() >= decoding_.seconds) return n + 1;
            if (__atomic_load_n(decoding_.interrupt, __ATOMIC_RELAXED)) return n + 1;
            for (int i = 0; i < rows; i++)
                if (ends(i)) return n + 1;
            for (int i = 0; i < rows; i++) {
                decoding_.ids[step_.logit_rows[i]] = (int32_t)step_.argmax_ids[i];
                decoding_.positions[step_.logit_rows[i]]++;
            }
        }
    }

  private:
    void sample(int n) {
        Sample sample = *decoding_.sample;
        sample.uniforms += (size_t)n * sample.rows;
        WorkQueue queue;
        pool_.run([&](int thread) {
            queue.for_each(sample.rows, [&](int row) {
                if (sample.temperatures[row] != 0) step_.argmax_ids[row] = samplers_[thread].sample(sample, row);
            });
        });
    }

    bool ends(int row) const {
        const int32_t *first = decoding_.end_ids + decoding_.end_starts[row], *end = decoding_.end_ids + decoding_.end_starts[row + 1];
        return !std::isfinite(step_.max_logits[row]) || std::find(first, end, step_.argmax_ids[row]) != end;
    }

    Decoder& decoder_;
    ThreadPool& pool_;
    std::vector<Sampler>& samplers_;
    Step step_;
    const Decoding& decoding_;
};
