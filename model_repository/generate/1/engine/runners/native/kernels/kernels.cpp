// The C interface that structures.py and runner.py call: open_model, then step_model, project_rows, sample_tokens and
// score_rows, then close_model; and pack_bf16_weights while weights are loaded.
// Layout of the structures: program.hpp, step.hpp, sample.hpp, score.hpp. ISA variants: isa_variants.py compiles this file once
// for each, and chooses one library at load time. Tests: tests/inference/test_native*.py.

#include <memory>
#include <utility>
#include <vector>

#include "bf16_packed.hpp"
#include "interpreter.hpp"
#include "packing_pays.hpp"
#include "program.hpp"
#include "sample.hpp"
#include "score.hpp"
#include "step.hpp"
#include "thread_pool.hpp"

namespace {

struct Handle {
    ThreadPool pool;
    std::unique_ptr<Decoder> decoder;
    // One for each thread.
    std::vector<Sampler> samplers;
    std::vector<Scorer> scorers;
};

std::unique_ptr<Decoder> make_decoder(const Program& program, bool is_bf16, bool is_int8, bool int8_kv) {
    if (is_bf16 && is_int8) return std::make_unique<Interpreter<bf16, int8_t>>(program, int8_kv);
    if (is_bf16) return std::make_unique<Interpreter<bf16, bf16>>(program, int8_kv);
    if (is_int8) return std::make_unique<Interpreter<float, int8_t>>(program, int8_kv);
    return std::make_unique<Interpreter<float, float>>(program, int8_kv);
}

}  // namespace

extern "C" {

// is_bf16: the type of activations; is_int8: that of the weights. The KV cache has the type of activations, or int8_kv.
void* open_model(const Program* program, int is_bf16, int is_int8, int int8_kv, int threads) {
    auto decoder = make_decoder(*program, is_bf16, is_int8, int8_kv);
    return new Handle{ThreadPool(threads), std::move(decoder), std::vector<Sampler>(threads), std::vector<Scorer>(threads)};
}

void step_model(void* model, const Step* step) {
    auto* handle = static_cast<Handle*>(model);
    handle->decoder->step(handle->pool, *step);
}

void sample_tokens(void* model, const Sample* sample) {
    auto* handle = static_cast<Handle*>(model);
    WorkQueue queue;
    handle->pool.run([&](int thread) {
        queue.for_each(sample->rows, [&](int row) { sample->ids[row] = handle->samplers[thread].sample(*sample, row); });
    });
}

void project_rows(void* model, const Project* project) {
    auto* handle = static_cast<Handle*>(model);
    handle->decoder->project(handle->pool, *project);
}

void score_rows(void* model, const Score* score) {
    auto* handle = static_cast<Handle*>(model);
    WorkQueue queue;
    handle->pool.run([&](int thread) {
        queue.for_each(score->rows, [&](int row) { handle->scorers[thread].score(*score, row); });
    });
}

// Whether packed weights are faster here, for this number of threads.
int bf16_packed_pays(int threads) { return packing_pays(threads); }

// Returns the number of outliers, or -1 if the weights are not packed: there are more than `limit` outliers, or the processor
// does not unpack them.
int64_t pack_bf16_weights(
    const uint16_t* weights, int blocks, int inputs, uint8_t* tiles, Outlier* outliers, int64_t* outlier_offsets, int64_t limit,
    int* max_exponent
) {
    if (!kCanUnpack) return -1;
    *max_exponent = choose_max_exponent(weights, (size_t)blocks * inputs * kVecSize);
    return pack_bf16(weights, blocks, inputs, *max_exponent, tiles, outliers, outlier_offsets, limit);
}

void close_model(void* model) { delete static_cast<Handle*>(model); }

}  // extern "C"
