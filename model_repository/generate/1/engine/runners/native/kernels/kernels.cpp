// What Python calls: a model is opened, computes step after step, and is closed.

#include <memory>
#include <vector>

#include "draw.hpp"
#include "model.hpp"
#include "score.hpp"
#include "step.hpp"
#include "team.hpp"
#include "tight.hpp"
#include "transformer.hpp"

namespace {

struct Handle {
    Team team;
    std::unique_ptr<Decoder> decoder;
    std::vector<Drawer> drawers;
    std::vector<Scorer> scorers;
};

std::unique_ptr<Decoder> make(const Model& model, bool halves, bool bytes) {
    if (halves && bytes) return std::make_unique<Transformer<bf16, int8_t>>(model);
    if (halves) return std::make_unique<Transformer<bf16, bf16>>(model);
    if (bytes) return std::make_unique<Transformer<float, int8_t>>(model);
    return std::make_unique<Transformer<float, float>>(model);
}

}  // namespace

extern "C" {

void* open_model(const Model* model, int halves, int bytes, int threads) {
    return new Handle{Team(threads), make(*model, halves, bytes), std::vector<Drawer>(threads), std::vector<Scorer>(threads)};
}

void step_model(void* opened, const Step* step) {
    auto* handle = static_cast<Handle*>(opened);
    handle->decoder->step(handle->team, *step);
}

void draw_tokens(void* opened, const Draw* draw) {
    auto* handle = static_cast<Handle*>(opened);
    Share share;
    handle->team.run([&](int member) {
        share.each(draw->rows, [&](int row) { draw->ids[row] = handle->drawers[member].draw(*draw, row); });
    });
}

void project_rows(void* opened, const Project* project) {
    auto* handle = static_cast<Handle*>(opened);
    handle->decoder->project(handle->team, *project);
}

void score_rows(void* opened, const Score* score) {
    auto* handle = static_cast<Handle*>(opened);
    Share share;
    handle->team.run([&](int member) {
        share.each(score->rows, [&](int row) { handle->scorers[member].score(*score, row); });
    });
}

// Whether weights of twelve bits are sooner there than those of sixteen. Without AVX-512, making numbers of them takes
// longer than reading them.
int tight_weights_pay() {
#ifdef __AVX512BW__
    return 1;
#else
    return 0;
#endif
}

// How many strays there are; -1 where weights are better left as they are: with more strays than `most`, or without an
// instruction that looks up bytes.
int64_t tighten_weights(
    const uint16_t* weights, int blocks, int inputs, uint8_t* tiles, Stray* strays, int64_t* begins, int64_t most, int* highest
) {
#ifdef __SSSE3__
    *highest = highest_exponent(weights, (size_t)blocks * inputs * kLanes);
    return tighten(weights, blocks, inputs, *highest, tiles, strays, begins, most);
#else
    return -1;
#endif
}

void close_model(void* opened) { delete static_cast<Handle*>(opened); }

}  // extern "C"
