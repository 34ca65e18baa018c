// The C interface that structures.py and runner.py call: open_model, then step_model, decode_steps, project_rows, sample_tokens
// and score_rows, then close_model; and pack_bf16_weights and pack_grouped_weights while weights are loaded.
// Layout of the structures: program.hpp, step.hpp, decoding.hpp, sample.hpp, score.hpp. ISA variants: isa_variants.py compiles
// this file once for each, and chooses one library at load time. Tests: tests/inference/test_native*.py.

#include <memory>
#include <utility>
#include <vector>

#include "bf16_packed.hpp"
#include "decoding.hpp"
#include "grouped_form.hpp"
#include "grouped_pack.hpp"
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

std::unique_ptr<Decoder> make_decoder(const Program& program, bool is_bf16, bool int8_kv) {
    if (is_bf16) return std::make_unique<Interpreter<bf16>>(program, int8_kv);
    return std::make_unique<Interpreter<float>>(program, int8_kv);
}

}  // namespace

extern "C" {

// is_bf16: the type of activations, of the KV cache unless it is int8_kv, and of weights whose form is kFull.
void* open_model(const Program* program, int is_bf16, int int8_kv, int threads) {
    auto decoder = make_decoder(*program, is_bf16, int8_kv);
    return new Handle{ThreadPool(threads), std::move(decoder), std::vector<Sampler>(threads), std::vector<Scorer>(threads)};
}

void step_model(void* model, const Step* step) {
    auto* handle = static_cast<Handle*>(model);
    handle->decoder->step(handle->pool, *step);
}

// Returns how many steps it has computed.
int decode_steps(void* model, const Step* step, const Decoding* decoding) {
    auto* handle = static_cast<Handle*>(model);
    return DecodingLoop(*handle->decoder, handle->pool, handle->samplers, *step, *decoding).run();
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
    int threads, int* exponent_pairs
) {
    if (!kCanUnpack) return -1;
    *exponent_pairs = choose_exponent_pairs(weights, (size_t)blocks * inputs * kVecSize);
    return pack_bf16(weights, blocks, inputs, ExponentPairs(*exponent_pairs), tiles, outliers, outlier_offsets, limit, threads);
}

// Fills in the sizes of a form of weights in groups, and returns the bytes of a block with this many inputs.
int64_t size_grouped_form(GroupedForm* form, int inputs) {
    form->complete();
    return (int64_t)grouped_block_bytes(*form, inputs);
}

// `to` holds zeros.
void pack_grouped_weights(const GroupedForm* form, const GroupedSource* source, int threads, uint8_t* to) {
    pack_grouped_blocks(*form, *source, threads, to);
}

void close_model(void* model) { delete static_cast<Handle*>(model); }

}  // extern "C"
