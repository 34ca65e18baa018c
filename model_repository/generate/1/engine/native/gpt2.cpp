// One step of a GPT-2 on a CPU: all rows of a plan, prompt chunks and decoding ones, from token ids to logits.
//
// Between the products everything is float32; rows go into a product, and keys and values into the cache, in the
// model's type, which is the weights' own or what weights of eight bits become. Each row is computed by itself, in an order that no other row changes. It knows pointers and sizes;
// who owns the memory, and what the rows mean, its caller knows.

#include <chrono>
#include <cmath>
#include <memory>

#include "attention.hpp"
#include "gemm.hpp"
#include "lanes.hpp"
#include "step.hpp"
#include "team.hpp"

// The same fields, in the same order, as the structures in gpt2.py.
struct Weights {
    const void* values;
    // Of weights of eight bits.
    const float* scales;
    const float* bias;
};

struct Layer {
    const float *first_scale, *first_shift, *second_scale, *second_shift;
    Weights attend, project, widen, narrow;
};

struct Model {
    int32_t layers, width, heads, inner, vocabulary;
    float epsilon;
    Weights tokens;
    const float *positions, *final_scale, *final_shift;
    const Layer* layer;
};

namespace {

enum Kind { kProducts, kAttention, kLogits, kOther };

// Of one step, from part to part.
class Clock {
  public:
    explicit Clock(double* spent = nullptr) : spent_(spent), last_(spent ? Time::now() : Time::time_point()) {}

    void lap(Kind kind) {
        if (!spent_) return;
        const auto now = Time::now();
        spent_[kind] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

  private:
    typedef std::chrono::steady_clock Time;
    double* spent_;
    Time::time_point last_;
};

class Decoder {
  public:
    virtual ~Decoder() = default;
    virtual void step(Team& team, const Step& step) = 0;
};

// T is the type of rows, keys and values, W that of weights.
template <typename T, typename W>
class Gpt2 : public Decoder {
  public:
    explicit Gpt2(const Model& model)
        : model_(model), attention_(model.heads, 1, model.width / model.heads),
          shares_(model.layers * kPartsOfLayer + kOtherParts) {}

    void step(Team& team, const Step& step) override {
        reserve(step.rows, team.size());
        attention_.begin(step, team.size());
        for (auto& share : shares_) share.reset();
        clock_ = Clock(step.spent);
        team.run([&](int member) {
            begin_tiles();
            embed(step);
            end_part(team, member, kOther);
            for (int layer = 0; layer < model_.layers; layer++) one_layer(team, step, layer, member);
            finish(team, step, member);
            end_tiles();
        });
    }

  private:
    // All members end a part together; the first one looks at the clock.
    void end_part(Team& team, int member, Kind kind) {
        team.meet();
        if (member == 0) clock_.lap(kind);
    }

    void reserve(int rows, int members) {
        const size_t padded = (rows + 2 * kTileRows - 1) / (2 * kTileRows) * 2 * kTileRows;
        if (padded <= reserved_) return;
        reserved_ = padded;
        stream_.resize(padded * model_.width);
        queries_.resize(padded * model_.width);
        normal_.resize(padded * model_.width);
        attended_.resize(padded * model_.width);
        widened_.resize(padded * model_.inner);
        expanded_.resize(members);
    }

    void embed(const Step& step) {
        const W* tokens = static_cast<const W*>(model_.tokens.values);
        constexpr int kTogether = sizeof(W) == sizeof(bf16) ? 2 : 1;
        other(0).each(step.rows, [&](int row) {
            const int id = step.ids[row];
            const float scale = kExpands ? model_.tokens.scales[id] : 1.0f;
            const W* packed = tokens + (size_t)(id / kLanes) * model_.width * kLanes + id % kLanes * kTogether;
            const float* place = model_.positions + (size_t)step.places[row] * model_.width;
            float* to = &stream_[(size_t)row * model_.width];
            for (int k = 0; k < model_.width; k++)
                to[k] = value(packed[(size_t)(k / kTogether) * kLanes * kTogether + k % kTogether]) * scale + place[k];
        });
    }

    template <typename Out>
    void normalise(const float* from, const float* scale, const float* shift, Out* to) const {
        const int width = model_.width;
        Lanes total = {}, squares = {};
        for (int k = 0; k < width; k += kLanes) total += load(from + k);
        const float mean = sum(total) / width;
        for (int k = 0; k < width; k += kLanes) {
            const Lanes apart = load(from + k) - mean;
            squares += apart * apart;
        }
        const float inverse = 1.0f / std::sqrt(sum(squares) / width + model_.epsilon);
        for (int k = 0; k < width; k += kLanes)
            store(to + k, (load(from + k) - mean) * inverse * load(scale + k) + load(shift + k));
    }

    void normalise_rows(const Step& step, const float* scale, const float* shift, Share& share) {
        const size_t width = model_.width;
        share.each(step.rows, [&](int row) { normalise(&stream_[row * width], scale, shift, &normal_[row * width]); });
    }

    // Each part of a step is shared out by itself.
    Share& part(int layer, int number) { return shares_[layer * kPartsOfLayer + number]; }
    Share& other(int number) { return shares_[model_.layers * kPartsOfLayer + number]; }

    void one_layer(Team& team, const Step& step, int number, int member) {
        const Layer& layer = model_.layer[number];
        const int width = model_.width;
        normalise_rows(step, layer.first_scale, layer.first_shift, part(number, 0));
        end_part(team, member, kOther);
        T *keys = static_cast<T*>(step.keys[number]), *values = static_cast<T*>(step.values[number]);
        times(normal_.data(), step.rows, layer.attend, width, 3 * width, part(number, 1), member, [&](int row, int block, Lanes found) {
            const int column = block * kLanes;
            found += load(layer.attend.bias + column);
            if (column < width) store(&queries_[(size_t)row * width + column], found);
            else if (column < 2 * width) attention_.keep_key(keys, row, column - width, found);
            else attention_.keep_value(values, row, column - 2 * width, found);
        });
        end_part(team, member, kProducts);
        attention_.attend(keys, values, queries_.data(), attended_.data(), part(number, 2), member);
        end_part(team, member, kAttention);
        add_product(step, attended_.data(), layer.project, width, part(number, 3), member);
        end_part(team, member, kProducts);
        normalise_rows(step, layer.second_scale, layer.second_shift, part(number, 4));
        end_part(team, member, kOther);
        times(normal_.data(), step.rows, layer.widen, width, model_.inner, part(number, 5), member, [&](int row, int block, Lanes found) {
            const int column = block * kLanes;
            store(&widened_[(size_t)row * model_.inner + column], gelu(found + load(layer.widen.bias + column)));
        });
        end_part(team, member, kProducts);
        add_product(step, widened_.data(), layer.narrow, model_.inner, part(number, 6), member);
        end_part(team, member, kProducts);
    }

    // Onto the stream that runs through all layers.
    void add_product(const Step& step, const T* rows, const Weights& weights, int inputs, Share& share, int member) {
        const int width = model_.width;
        times(rows, step.rows, weights, inputs, width, share, member, [&](int row, int block, Lanes found) {
            float* to = &stream_[(size_t)row * width + block * kLanes];
            store(to, load(to) + found + load(weights.bias + block * kLanes));
        });
    }

    template <typename Done>
    void times(const T* rows, int count, const Weights& weights, int inputs, int outputs, Share& share, int member, Done done) {
        const W* values = static_cast<const W*>(weights.values);
        if constexpr (kExpands)
            multiply(rows, count, values, weights.scales, inputs, outputs, share, expanded_[member], done);
        else multiply(rows, count, values, inputs, outputs, share, done);
    }

    void finish(Team& team, const Step& step, int member) {
        const int width = model_.width;
        other(1).each(step.wanted_rows, [&](int i) {
            float* hidden = step.hidden + (size_t)i * width;
            normalise(&stream_[(size_t)step.wanted[i] * width], model_.final_scale, model_.final_shift, hidden);
            for (int k = 0; k < width; k += kLanes) store(&normal_[(size_t)i * width + k], load(hidden + k));
        });
        end_part(team, member, kOther);
        const int outputs = (model_.vocabulary + kLanes - 1) / kLanes * kLanes;
        times(normal_.data(), step.wanted_rows, model_.tokens, width, outputs, other(2), member, [&](int row, int block, Lanes found) {
            store(step.logits + (size_t)row * step.stride + block * kLanes, found);
        });
        team.meet();
        other(3).each(step.wanted_rows, [&](int row) {
            const Best best = best_of(step.logits + (size_t)row * step.stride, model_.vocabulary);
            step.best[row] = best.value;
            step.best_ids[row] = best.place;
        });
        end_part(team, member, kLogits);
    }

    static constexpr bool kExpands = sizeof(W) == 1;
    static constexpr int kPartsOfLayer = 7, kOtherParts = 4;

    const Model model_;
    Attention<T> attention_;
    std::vector<Share> shares_;
    size_t reserved_ = 0;
    Clock clock_;
    Numbers<float> stream_, queries_;
    Numbers<T> normal_, attended_, widened_;
    // Each member's weights of eight bits, as they are multiplied.
    std::vector<Numbers<T>> expanded_;
};

struct Handle {
    Team team;
    std::unique_ptr<Decoder> decoder;
};

std::unique_ptr<Decoder> make(const Model& model, bool halves, bool bytes) {
    if (halves && bytes) return std::make_unique<Gpt2<bf16, int8_t>>(model);
    if (halves) return std::make_unique<Gpt2<bf16, bf16>>(model);
    if (bytes) return std::make_unique<Gpt2<float, int8_t>>(model);
    return std::make_unique<Gpt2<float, float>>(model);
}

}  // namespace

extern "C" {

void* gpt2_open(const Model* model, int halves, int bytes, int threads) {
    return new Handle{Team(threads), make(*model, halves, bytes)};
}

void gpt2_step(void* opened, const Step* step) {
    auto* handle = static_cast<Handle*>(opened);
    handle->decoder->step(handle->team, *step);
}

void gpt2_close(void* opened) { delete static_cast<Handle*>(opened); }

}  // extern "C"
